"""The page: what its template needs, in words. ``assets/report/page.html`` and ``page.css`` have the form."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2

from cocoop_fast.config import flatten, to_mapping
from cocoop_fast.protocols.published import published_setting
from cocoop_fast.protocols.table import AVERAGE, Entry, shown
from cocoop_fast.readable import readable_bytes, readable_flops, readable_time
from cocoop_fast.report.chapters import Chapter, CloseUp, class_accuracy
from cocoop_fast.report.cost import Cost
from cocoop_fast.report.figures import confusions
from cocoop_fast.report.inspection import Tested
from cocoop_fast.report.sources import Run, Source
from cocoop_fast.report.words import METRICS, SUBSETS, data_name, method_name

NOTHING = "–"
_CONFUSIONS = 6  # listed in words


@dataclass(frozen=True)
class Cell:
    """One number of the results.

    Args:
        mean: ours.
        std: its deviation over seeds, "±0.31", or empty.
        published: the published number, or empty.
        best: whether ours is the best of its data set.
    """

    mean: str
    std: str
    published: str
    best: bool


@dataclass(frozen=True)
class ResultRow:
    method: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ResultGroup:
    dataset: str
    rows: tuple[ResultRow, ...]


def render(chapters: Sequence[Chapter], most_images: int) -> str:
    """The page of these chapters: HTML that needs no other file and no network.

    Args:
        chapters: in their order.
        most_images: test images that close-ups are made of, of each set of classes.
    """
    folder = files("cocoop_fast").joinpath("assets/report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "method": method_name,
        "data": data_name,
        "percent": lambda value: NOTHING if value is None else f"{value:.2f}",
        "time": readable_time,
        "png": lambda content: "data:image/png;base64," + base64.b64encode(content).decode(),
    }
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        title=_title(chapters),
        pixels=lambda inches: round(96 * inches),
        chapters=chapters,
        most_images=most_images,
        subsets=SUBSETS,
        answer=answer,
        result_columns=result_columns,
        result_groups=result_groups,
        result_notes=result_notes,
        class_rows=class_rows,
        confusions=lambda tested: confusions(tested, _CONFUSIONS),
        differs=differs,
        measured_rows=measured_rows,
        cost_rows=cost_rows,
        settings=settings,
    )


def answer(source: Source) -> str:
    """The result in a sentence; empty if there is nothing to compare."""
    datasets = list(dict.fromkeys(entry.dataset for entry in source.entries))
    dataset = AVERAGE if AVERAGE in datasets else datasets[0] if len(datasets) == 1 else None
    for metric in ("h", "accuracy", "all", "base", "new"):
        found = [e for e in source.entries if e.dataset == dataset and e.metric == metric]
        if found:
            break
    else:
        return ""
    best, *others = sorted(found, key=lambda entry: -entry.mean)
    where = "on average over the data sets" if dataset == AVERAGE else f"on {data_name(str(dataset))}"
    what = {
        "h": "a harmonic mean H of base and new accuracy of",
        "accuracy": "an accuracy of",
        "all": "an accuracy on all classes of",
        "base": "an accuracy on base classes of",
        "new": "an accuracy on new classes of",
    }[metric]
    sentence = f"{method_name(best.method)} reaches {what} {shown(best.mean, best.std)} % {where}"
    if others:
        gaps = [f"{best.mean - other.mean:.2f} points above {method_name(other.method)}" for other in others]
        sentence += ": " + " and ".join([", ".join(gaps[:-1]), gaps[-1]] if len(gaps) > 1 else gaps)
    return sentence + "."


def result_columns(source: Source) -> list[str]:
    return [name for metric, name in METRICS.items() if metric in _metrics(source)]


def result_groups(source: Source) -> list[ResultGroup]:
    """The table: data sets, and for each the methods; the average, if there is one, first."""
    by_row: dict[str, dict[str, dict[str, Entry]]] = {}
    for entry in source.entries:
        by_row.setdefault(entry.dataset, {}).setdefault(entry.method, {})[entry.metric] = entry
    metrics = _metrics(source)
    groups = []
    for dataset in sorted(by_row, key=lambda name: name != AVERAGE):
        methods = by_row[dataset]
        best = {
            metric: max((row[metric].mean for row in methods.values() if metric in row), default=None)
            for metric in metrics
        }
        rows = [
            ResultRow(
                method_name(method),
                tuple(_cell(row.get(metric), best[metric], len(methods)) for metric in metrics),
            )
            for method, row in methods.items()
        ]
        groups.append(ResultGroup(data_name(dataset), tuple(rows)))
    return groups


def result_notes(source: Source) -> list[str]:
    """What a reader must know to compare the numbers."""
    several = any(entry.std is not None for entry in source.entries)
    seeds = sorted({seed for entry in source.entries for seed in entry.seeds})
    notes = [f"Model {source.setting}; seed {', '.join(map(str, seeds))}."]
    notes.append(
        "Test accuracy in percent"
        + (": mean ± standard deviation over the seeds" if several else "")
        + "; the best of each data set is in bold."
    )
    if "h" in _metrics(source):
        notes.append("H is the harmonic mean of the mean base and new accuracies.")
    published = [entry.published for entry in source.entries if entry.published]
    if published:
        notes.append(f"Published: {published_setting()}.")
    if any(not number.checked for number in published):
        notes.append("† not checked against a second source or a sum: look it up before quoting it.")
    return notes


def class_rows(run: Run, tested: Tested) -> list[tuple[str, int, float | None]]:
    """Name, test images and accuracy of each class, in the order of the classes."""
    counts = [sum(row) for row in tested.metrics.confusion]
    return list(zip(tested.classnames, counts, class_accuracy(run, tested), strict=True))


def differs(run: Run, tested: Tested) -> str:
    """A warning if the run's own result is not what its model says now of the same images."""
    recorded = run.accuracy().get(tested.subset)
    if recorded is None or tested.metrics.total < tested.images or recorded == tested.metrics.accuracy:
        return ""
    return (
        f"Computed now, the accuracy on {SUBSETS[tested.subset]} is {tested.metrics.accuracy:.2f} %; the run recorded "
        f"{recorded:.2f} %. The images, the weights or the device may have changed since."
    )


def measured_rows(run: Run) -> list[tuple[str, str]]:
    """What the run itself recorded of its time and memory."""
    history, start = run.history, run.history.start
    rows = [
        ("Device and precision", f"{start['device']}, {start['precision']}"),
        ("Learned parameters", f"{start['parameters']:,}"),
        ("Training images", f"{start['train_images']:,}"),
        ("Epochs and steps", f"{start['epochs']:,} × {start['steps_per_epoch']:,}"),
    ]
    if history.seconds is not None:
        rows.append(("Training in all", readable_time(history.seconds)))
    if history.step_seconds is not None:
        rows.append(("A training step (median, images included)", readable_time(history.step_seconds)))
    if history.peak_memory is not None:
        rows.append(("Most memory that the process had", readable_bytes(history.peak_memory)))
    return rows


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


def settings(close_up: CloseUp) -> list[tuple[str, str]]:
    """Every field of the run's configuration."""
    fields = flatten(to_mapping(close_up.run.config))
    return [(name, "none" if value is None else str(value)) for name, value in fields]


def _title(chapters: Sequence[Chapter]) -> str:
    datasets = dict.fromkeys(
        data_name(entry.dataset) for c in chapters for entry in c.source.entries if entry.dataset != AVERAGE
    ) or dict.fromkeys(data_name(run.dataset) for c in chapters for run in c.source.runs)
    names = list(datasets)
    shown_names = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"Prompt learning on {shown_names}"


def _metrics(source: Source) -> list[str]:
    return [metric for metric in METRICS if any(entry.metric == metric for entry in source.entries)]


def _cell(entry: Entry | None, best: float | None, rivals: int) -> Cell:
    if entry is None:
        return Cell(NOTHING, "", "", best=False)
    published = ""
    if entry.published is not None:
        published = f"{entry.published.value:.2f}" + ("" if entry.published.checked else "†")
    mean, sign, std = shown(entry.mean, entry.std).partition("±")
    return Cell(mean, sign + std, published, best=rivals > 1 and entry.mean == best)
