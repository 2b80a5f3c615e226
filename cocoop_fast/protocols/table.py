"""From outcomes of cells to the numbers of the paper's tables: means, deviations and harmonic means.

As in the paper, H is the harmonic mean of the mean base and the mean new accuracy, and the average row's H that
of the averages. Deviations are over seeds, of the population (divided by n), as the reference's result parser
takes them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from cocoop_fast.evaluation.metrics import harmonic_mean
from cocoop_fast.methods.records import METHODS, label_of
from cocoop_fast.protocols.cells import Experiment
from cocoop_fast.protocols.protocol import in_shots
from cocoop_fast.protocols.published import Published, published_results
from cocoop_fast.protocols.run_cell import Outcome

AVERAGE = "average"
# In a table's order, with their titles. "accuracy" is of all classes, where a protocol tests on several data sets.
# After them: "shots_N", the accuracy on all classes with N training images of each.
_METRICS = {"base": "Base", "new": "New", "h": "H", "all": "All", "accuracy": "Accuracy"}
_SHOTS = "shots_"
BySeed = dict[int, float]


@dataclass(frozen=True)
class Entry:
    """One number of a table; as text ``97.50`` or ``97.50±0.31``.

    Args:
        dataset: tested on, or "average".
        method: by its short name, with that of its layout: "cocoop", "cocoop + ATPrompt".
        metric: "base", "new", "h", "all", "accuracy" or "shots_N".
        mean: percent.
        std: over seeds; ``None`` for a single one, and for a method that learns nothing, which has no seeds.
        seeds: the value of each.
        published: the paper's number, if it has one.
    """

    dataset: str
    method: str
    metric: str
    mean: float
    std: float | None
    seeds: BySeed
    published: Published | None

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Entry:
        """The inverse of ``dataclasses.asdict``, by way of JSON, whose keys are strings."""
        own = {field.name: values[field.name] for field in fields(cls)}
        own["seeds"] = {int(seed): value for seed, value in own["seeds"].items()}
        own["published"] = own["published"] and Published(**own["published"])
        return cls(**own)

    @property
    def one_seed(self) -> bool:
        """Whether another seed might give another number, and how far from this one is not known."""
        record = METHODS.get(self.method.split(" ")[0])
        return self.std is None and (record is None or record.learns)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f}±{self.std:.2f}"


def make_table(experiment: Experiment, outcomes: Sequence[Outcome]) -> tuple[Entry, ...]:
    """Entries by data set (in the order asked for, then "average"), method and metric.

    The source, if there is one, is the first data set, as in the paper. A data set counts in an average only if all
    of the method's data sets have every seed: averages over different data sets cannot be compared.
    """
    accuracy: dict[tuple[str, str], dict[str, BySeed]] = defaultdict(lambda: defaultdict(dict))
    for outcome in outcomes:
        cell = outcome.cell
        for tested_on, value in outcome.accuracy.items():
            if experiment.shots:
                for shots in (cell.shots,) if METHODS[cell.method].learns else experiment.shots:
                    accuracy[cell.dataset, cell.method][f"{_SHOTS}{shots}"][cell.seed] = value
            elif experiment.source is None:  # on some classes of the data set trained on
                accuracy[cell.dataset, cell.method][tested_on][cell.seed] = value
            else:  # on a data set
                accuracy[tested_on, cell.method]["accuracy"][cell.seed] = value
    for method in experiment.methods:
        measured = [accuracy[dataset, method] for dataset in experiment.datasets]
        accuracy[AVERAGE, method] = _average(measured, experiment.seeds)
    protocol = experiment.protocol
    entries: list[Entry] = []
    for dataset in dict.fromkeys((*experiment.trained_on, *experiment.datasets, AVERAGE)):
        # The paper's numbers are of its own source, and its averages of its own data sets.
        as_published = experiment.source == protocol.source and (
            dataset != AVERAGE or set(experiment.datasets) == set(protocol.datasets)
        )
        for method in experiment.methods:
            label = label_of(method, experiment.config.prompt.attributes)
            name = protocol.name if as_published and label == method else None
            own = entries_of(dataset, method, accuracy[dataset, method], name)
            entries += [replace(entry, method=label) for entry in own]
    return tuple(entries)


def _average(measured: Sequence[Mapping[str, BySeed]], seeds: Sequence[int]) -> dict[str, BySeed]:
    """Means over data sets, by metric and seed; nothing for a single data set, or where something is missing."""
    if len(measured) < 2:
        return {}
    return {
        metric: {seed: float(np.mean([one[metric][seed] for one in measured])) for seed in seeds}
        for metric in measured[0]
        if all(set(one.get(metric, ())) == set(seeds) for one in measured)
    }


def entries_of(
    dataset: str, method: str, accuracy: Mapping[str, BySeed], protocol: str | None
) -> list[Entry]:
    """The numbers of one method on one data set.

    Args:
        dataset, method: by name.
        accuracy: percent, by metric and seed; where "base" and "new" are both there, H is added.
        protocol: whose published numbers stand beside them; ``None``: none do.
    """
    by_seed = dict(accuracy)
    learns = method not in METHODS or METHODS[method].learns
    means = {metric: float(np.mean(list(values.values()))) for metric, values in accuracy.items()}
    if "base" in accuracy and "new" in accuracy:
        means["h"] = harmonic_mean(means["base"], means["new"])
        by_seed["h"] = {
            seed: harmonic_mean(base, accuracy["new"][seed]) for seed, base in accuracy["base"].items()
        }
    return [
        Entry(
            dataset=dataset,
            method=method,
            metric=metric,
            mean=means[metric],
            std=float(np.std(list(by_seed[metric].values())))
            if learns and len(by_seed[metric]) > 1
            else None,
            seeds=by_seed[metric],
            published=published_results().get((protocol, dataset, method, metric)) if protocol else None,
        )
        for metric in sorted(by_seed, key=_place)
    ]


def told_apart(one: Entry, other: Entry) -> bool:
    """Whether two means differ by more than the standard deviation, over seeds, of their difference.

    The difference is taken seed by seed, since methods see the same images with the same seed; where fewer than two seeds
    are of both, its deviation is the root of the summed squares of each one's.
    """
    both = one.seeds.keys() & other.seeds.keys()
    if len(both) > 1:
        deviation = float(np.std([one.seeds[seed] - other.seeds[seed] for seed in sorted(both)]))
    else:
        deviation = math.hypot(one.std or 0.0, other.std or 0.0)
    return abs(one.mean - other.mean) > deviation


def metrics_of(entries: Sequence[Entry]) -> dict[str, str]:
    """The metrics that occur, in a table's order, with their titles."""
    found = sorted({entry.metric for entry in entries}, key=_place)
    return {metric: _METRICS.get(metric) or in_shots(shots_of(metric)) for metric in found}


def shots_of(metric: str) -> int:
    """Training images a class of an accuracy by the number of them; 0 for any other metric."""
    return int(metric.removeprefix(_SHOTS)) if metric.startswith(_SHOTS) else 0


def _place(metric: str) -> tuple[int, int]:
    return shots_of(metric), list(_METRICS).index(metric) if metric in _METRICS else 0


def by_row(entries: Iterable[Entry]) -> dict[str, dict[str, dict[str, Entry]]]:
    """Entries by data set, method and metric, in their order."""
    rows: dict[str, dict[str, dict[str, Entry]]] = {}
    for entry in entries:
        rows.setdefault(entry.dataset, {}).setdefault(entry.method, {})[entry.metric] = entry
    return rows
