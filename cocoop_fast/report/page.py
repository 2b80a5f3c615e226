"""The page: what its template needs, in words. ``assets/report/page.html`` and ``page.css`` have the form."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence

import jinja2

from cocoop_fast.config import flatten, to_mapping
from cocoop_fast.protocols.outputs import notes
from cocoop_fast.protocols.table import AVERAGE, Entry, by_row, metrics_of
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
    functions = (answer, best_of, cost_rows, metrics_of, notes, results)
    environment.globals |= {function.__name__: function for function in functions}
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
    where = "on average over the data sets" if dataset == AVERAGE else f"on {data_name(best.dataset)}"
    sentence = f"{method_name(best.method)} reaches {reached} {best} % {where}"
    if others:
        *gaps, last = [f"{best.mean - one.mean:.2f} points above {method_name(one.method)}" for one in others]
        sentence += ": " + " and ".join([", ".join(gaps), last] if gaps else [last])
    return sentence + "."


def results(source: Source) -> dict[str, dict[str, dict[str, Entry]]]:
    """The table: entries by data set, method and metric; the average, if there is one, first."""
    rows = by_row(source.entries)
    return {dataset: rows[dataset] for dataset in sorted(rows, key=lambda name: name != AVERAGE)}


def best_of(methods: Mapping[str, Mapping[str, Entry]]) -> dict[str, float]:
    """The best mean by metric; nothing where there is nothing to compare."""
    best: dict[str, float] = {}
    for row in methods.values() if len(methods) > 1 else ():
        for metric, entry in row.items():
            best[metric] = max(entry.mean, best.get(metric, entry.mean))
    return best


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
