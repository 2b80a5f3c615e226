"""The page: what its template needs, in words. ``assets/report/page.html`` and ``page.css`` have the form."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence

import jinja2

from cocoop_fast.config import flatten, to_mapping
from cocoop_fast.evaluation.metrics import harmonic_mean
from cocoop_fast.files.provenance import provenance
from cocoop_fast.protocols.outputs import latex, notes
from cocoop_fast.protocols.table import AVERAGE, Entry, by_row, metrics_of, told_apart
from cocoop_fast.readable import printable, readable_bytes, readable_flops, readable_time
from cocoop_fast.report.chapters import Chapter
from cocoop_fast.report.cost import Cost
from cocoop_fast.report.sources import Source
from cocoop_fast.report.words import SUBSETS, data_name, method_name

NOTHING = "–"
# By metric, in the order in which they answer.
_ANSWERS = {
    "h": "a harmonic mean H of base and new accuracy of",
    "accuracy": "an accuracy of",
    "all": "an accuracy on all classes of",
    "base": "an accuracy on base classes of",
    "new": "an accuracy on new classes of",
}


def render(chapters: Sequence[Chapter], most_images: int) -> str:
    """The page of these chapters: HTML that needs no other file and no network.

    Args:
        chapters: in their order.
        most_images: test images that close-ups are made of, of each set of classes.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cocoop_fast", "assets/report"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not what is HTML already
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "method": method_name,
        "data": data_name,
        "percent": lambda value: NOTHING if value is None else f"{value:.2f}",
        "png": lambda content: "data:image/png;base64," + base64.b64encode(content).decode(),
        "pixels": lambda inches: round(96 * inches),
        "whole": "{:,}".format,
        "time": readable_time,
        "bytes": readable_bytes,
        "fields": lambda config: flatten(to_mapping(config)),
    }
    functions = (
        answer, best_of, chance_of, cost_rows, latex, metrics_of, notes, provenance, results, short_of_images
    )  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions} | {
        "method_name": method_name
    }
    return environment.get_template("page.html").render(
        title=_title(chapters),
        chapters=chapters,
        most_images=most_images,
        subsets=SUBSETS,
    )


def answer(source: Source) -> str:
    """The result in a sentence; empty if there is nothing to compare."""
    datasets = list(dict.fromkeys(entry.dataset for entry in source.entries))
    dataset = AVERAGE if AVERAGE in datasets else datasets[0] if len(datasets) == 1 else None
    here = [entry for entry in source.entries if entry.dataset == dataset]
    metrics = metrics_of(here)
    metric = next((name for name in _ANSWERS if name in metrics), None)
    if metric is None and metrics:  # the curves' end, where most is learned
        metric = list(metrics)[-1]
    if metric is None:
        return ""
    reached = _ANSWERS.get(metric) or f"with {metrics[metric]} an accuracy of"
    found = [entry for entry in here if entry.metric == metric]
    best, *others = sorted(found, key=lambda entry: -entry.mean)
    above = [one for one in others if told_apart(best, one)]
    like = [one for one in others if not told_apart(best, one)]
    where = "on average over the data sets" if dataset == AVERAGE else f"on {data_name(best.dataset)}"
    sentence = f"{method_name(best.method)} reaches {reached} {best} % {where}"
    if above:
        sentence += ": " + _listed(
            [f"{best.mean - one.mean:.2f} points above {method_name(one.method)}" for one in above]
        )
    sentence += "."
    if like:
        one_of = _listed([f"{method_name(one.method)} ({one})" for one in like])
        sentence += f" It cannot be told apart from {one_of}: seeds differ by as much."
    if others and any(entry.one_seed for entry in found):
        sentence += " How much another seed would change is not known."
    return sentence


def _listed(items: Sequence[str]) -> str:
    *first, last = items
    return " and ".join([", ".join(first), last] if first else [last])


def results(source: Source) -> dict[str, dict[str, dict[str, Entry]]]:
    """The table: entries by data set, method and metric; the average, if there is one, first."""
    rows = by_row(source.entries)
    return {dataset: rows[dataset] for dataset in sorted(rows, key=lambda name: name != AVERAGE)}


def best_of(methods: Mapping[str, Mapping[str, Entry]]) -> list[Entry]:
    """The best by metric, and those that cannot be told apart from it; nothing where there is nothing to compare."""
    found: list[Entry] = []
    rows = list(methods.values()) if len(methods) > 1 else []
    for metric in dict.fromkeys(metric for row in rows for metric in row):
        here = [row[metric] for row in rows if metric in row]
        best = max(here, key=lambda entry: entry.mean)
        found += [entry for entry in here if entry.mean == best.mean or not told_apart(best, entry)]
    return found


def chance_of(source: Source, dataset: str) -> dict[str, float]:
    """The accuracy of guessing, in percent, by metric, where the runs recorded how many classes they were tested on."""
    tested = [run.classes_tested() for run in source.runs if run.dataset == dataset and run.classes_tested()]
    found: dict[str, float] = {}
    for entry in source.entries:
        name = entry.metric if entry.metric in SUBSETS else "all"
        counts = {one[name] for one in tested if name in one}
        if entry.dataset == dataset and entry.metric != "h" and len(counts) == 1:
            found[entry.metric] = 100 / counts.pop()
    if "base" in found and "new" in found:
        found["h"] = harmonic_mean(found["base"], found["new"])
    return found


def short_of_images(source: Source) -> list[str]:
    """A sentence for each data set some of whose classes have fewer training images than were asked for."""
    found: dict[str, tuple[int, int]] = {}
    for run in source.runs:
        if short := run.short_classes():
            found[run.dataset] = max(found.get(run.dataset, short), short)
    return [
        f"In {data_name(dataset)} {count} {'class has' if count == 1 else 'classes have'} fewer training images than that, "
        f"as few as {least}."
        for dataset, (count, least) in found.items()
    ]


def cost_rows(cost: Cost) -> list[tuple[str, str, str, str]]:
    """The prediction: what, for distinct rows, for the dense way, and how many times more that is."""
    tree, dense = cost.tree, cost.dense
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("Token rows through the text tower", tree.step.rows, dense.step.rows, "{:,.0f}".format),
        ("Floating-point operations", tree.step.flops, dense.step.flops, readable_flops),
        ("Memory beside the model", tree.memory.beyond_model, dense.memory.beyond_model, readable_bytes),
    ]
    if cost.device is not None:
        rows.append(("Time of a step", tree.step_seconds, dense.step_seconds, readable_time))
        whole = cost.steps * tree.step_seconds, cost.steps * dense.step_seconds
        rows.append((f"Time of all {cost.steps:,} steps", *whole, readable_time))
    return [
        (name, form(ours), form(theirs), f"{theirs / ours:.3g} ×" if ours else NOTHING)
        for name, ours, theirs, form in rows
    ]


def _title(chapters: Sequence[Chapter]) -> str:
    sources = [chapter.source for chapter in chapters]
    tested = [entry.dataset for source in sources for entry in source.entries if entry.dataset != AVERAGE]
    trained_on = [run.dataset for source in sources for run in source.runs]
    names = [data_name(dataset) for dataset in dict.fromkeys(tested or trained_on)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Prompt learning on {', '.join(names[:3])}{more}"
