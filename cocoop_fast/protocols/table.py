"""From outcomes of cells to the numbers of the paper's tables: means, deviations and harmonic means.

As in the paper, H is the harmonic mean of the mean base and the mean new accuracy, and the average row's H that
of the averages. Deviations are over seeds, of the population (divided by n), as the reference's result parser
takes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cocoop_fast.evaluation.metrics import harmonic_mean
from cocoop_fast.protocols.cells import Experiment
from cocoop_fast.protocols.published import Published, published_results
from cocoop_fast.protocols.run_cell import Outcome

AVERAGE = "average"
BySeed = dict[int, float]


@dataclass(frozen=True)
class Entry:
    """One number of a table.

    Args:
        dataset: tested on, or "average".
        method: by its short name.
        metric: "base", "new", "h", "all", or "accuracy".
        mean: percent.
        std: over seeds; ``None`` for a single one.
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


def make_table(experiment: Experiment, outcomes: Sequence[Outcome]) -> tuple[Entry, ...]:
    """Entries by data set (in the order asked for, then "average"), method and metric.

    A data set counts in an average only if all of the method's data sets have every seed: averages over
    different data sets cannot be compared.
    """
    accuracy = _collect(experiment, outcomes)
    rows = _row_names(experiment)
    entries: list[Entry] = []
    for dataset in rows:
        for method in experiment.methods:
            entries += _entries(experiment, dataset, method, accuracy.get((dataset, method), {}))
    for method in experiment.methods:
        measured = [accuracy.get((dataset, method), {}) for dataset in experiment.datasets]
        entries += _entries(experiment, AVERAGE, method, _average(measured, experiment.seeds))
    return tuple(entries)


def _row_names(experiment: Experiment) -> tuple[str, ...]:
    """The source, if there is one, is the first row, as in the paper."""
    if experiment.source is None:
        return experiment.datasets
    return tuple(dict.fromkeys((experiment.source, *experiment.datasets)))


def _collect(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], dict[str, BySeed]]:
    """Accuracy by (data set, method), then metric, then seed."""
    found: dict[tuple[str, str], dict[str, BySeed]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        for tested_on, value in (outcome.accuracy or {}).items():
            if experiment.source is None:
                key, metric = (cell.dataset, cell.method), tested_on
            else:
                key, metric = (tested_on, cell.method), "accuracy"
            found.setdefault(key, {}).setdefault(metric, {})[cell.seed] = value
    return found


def _average(measured: Sequence[dict[str, BySeed]], seeds: Sequence[int]) -> dict[str, BySeed]:
    """Means over data sets, by metric and seed; nothing for a single data set, or where something is missing."""
    if len(measured) < 2:
        return {}
    metrics = [name for name in measured[0] if all(name in one for one in measured)]
    return {
        metric: {seed: float(np.mean([one[metric][seed] for one in measured])) for seed in seeds}
        for metric in metrics
        if all(set(one[metric]) == set(seeds) for one in measured)
    }


def _entries(experiment: Experiment, dataset: str, method: str, accuracy: dict[str, BySeed]) -> list[Entry]:
    means = {metric: float(np.mean(list(values.values()))) for metric, values in accuracy.items()}
    by_seed = dict(accuracy)
    if "base" in accuracy and "new" in accuracy:
        means["h"] = harmonic_mean(means["base"], means["new"])
        by_seed["h"] = {
            seed: harmonic_mean(base, accuracy["new"][seed]) for seed, base in accuracy["base"].items()
        }
    order = ("base", "new", "h", "all", "accuracy")
    return [
        Entry(
            dataset=dataset,
            method=method,
            metric=metric,
            mean=means[metric],
            std=float(np.std(list(by_seed[metric].values()))) if len(by_seed[metric]) > 1 else None,
            seeds=by_seed[metric],
            published=_published(experiment, dataset, method, metric),
        )
        for metric in order
        if metric in by_seed
    ]


def _published(experiment: Experiment, dataset: str, method: str, metric: str) -> Published | None:
    """The paper's number, if it was measured on the same: its source, and for an average its data sets."""
    protocol = experiment.protocol
    if experiment.source != protocol.source:
        return None
    if dataset == AVERAGE and set(experiment.datasets) != set(protocol.datasets):
        return None
    return published_results().get((protocol.name, dataset, method, metric))


def shown(mean: float, std: float | None) -> str:
    """``97.50`` or ``97.50±0.31``."""
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.2f}" if std is None else f"{mean:.2f}±{std:.2f}"
