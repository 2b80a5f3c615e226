"""The chapters of a report: each source with its plots and its runs looked at closely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cocoop_fast.errors import UserError
from cocoop_fast.protocols.table import AVERAGE
from cocoop_fast.report import figures
from cocoop_fast.report.cost import Cost, estimate
from cocoop_fast.report.inspection import Inspection, Inspector, Tested
from cocoop_fast.report.sources import Run, Source
from cocoop_fast.report.style import Picture
from cocoop_fast.report.words import slug


@dataclass(frozen=True)
class CloseUp:
    """A run that was looked at closely.

    Args:
        run: which.
        inspection: ``None`` if it could not be looked at.
        problem: why not, in a sentence.
        pictures: by kind and subset, "classes base" or "shifts".
        cost: ``None`` if nothing is known of it.
    """

    run: Run
    inspection: Inspection | None
    problem: str
    pictures: dict[str, Picture]
    cost: Cost | None


@dataclass(frozen=True)
class Chapter:
    """A source with its plots.

    Args:
        source: the table and its runs.
        bars: of accuracies.
        curves: of each method on each data set.
        close_ups: of one run of each method on each data set, as many as were asked for.
        left_out: how many more there would be.
    """

    source: Source
    bars: tuple[Picture, ...]
    curves: tuple[Picture, ...]
    close_ups: tuple[CloseUp, ...]
    left_out: int


def make_chapters(
    sources: Sequence[Source], inspector: Inspector, close_ups: int, tell: Callable[[str], None]
) -> tuple[Chapter, ...]:
    """A chapter for each source.

    Args:
        sources: what was read.
        inspector: looks at runs.
        close_ups: how many runs it looks at, in all chapters together.
        tell: is told which.
    """
    chapters: list[Chapter] = []
    for number, source in enumerate(sources, 1):
        prefix = (str(number),) if len(sources) > 1 else ()
        groups = _by_method(source.runs)
        begun = [group for group in groups if any(run.history.start for run in group)]
        chosen = begun[: close_ups - sum(len(chapter.close_ups) for chapter in chapters)]
        curves = (
            figures.learning_curves(group, slug("curves", *prefix, *_name(group[0]))) for group in groups
        )
        chapters.append(
            Chapter(
                source=source,
                bars=tuple(_bars(source, prefix)),
                curves=tuple(one for one in curves if one is not None),
                close_ups=tuple(_look_at(_best_known(group), inspector, prefix, tell) for group in chosen),
                left_out=len(begun) - len(chosen),
            )
        )
    return tuple(chapters)


def _bars(source: Source, prefix: tuple[str, ...]) -> Iterator[Picture]:
    entries = source.entries
    if not entries:
        return
    if all(entry.metric == "accuracy" for entry in entries):
        yield figures.transfer_bars(entries, slug("accuracy", *prefix))
        return
    datasets = list(dict.fromkeys(entry.dataset for entry in entries))
    for dataset in sorted(datasets, key=lambda name: name != AVERAGE):  # the average answers first
        own = [entry for entry in entries if entry.dataset == dataset]
        yield figures.accuracy_bars(dataset, own, slug("accuracy", *prefix, dataset))


def _by_method(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.label), []).append(run)
    return list(groups.values())


def _name(run: Run) -> tuple[str, str]:
    return run.dataset, run.label


def _best_known(group: list[Run]) -> Run:
    """The first run that is finished, else the first: one in its middle says something, too."""
    return next((run for run in group if run.results is not None), group[0])


def _look_at(run: Run, inspector: Inspector, prefix: tuple[str, ...], tell: Callable[[str], None]) -> CloseUp:
    tell(f"looking at {run.path}")
    try:
        inspection = inspector.inspect(run)
        cost = estimate(inspection)
    except UserError as error:
        return CloseUp(run, None, str(error), {}, None)
    pictures: dict[str, Picture] = {}
    for tested in inspection.tested:
        name = (*prefix, *_name(run), tested.subset)
        accuracy = class_accuracy(run, tested)
        pictures[f"classes {tested.subset}"] = figures.class_bars(
            tested, accuracy, run.method, slug("classes", *name)
        )
        matrix = figures.confusion_matrix(tested, slug("confusion", *name))
        if matrix is not None:
            pictures[f"confusion {tested.subset}"] = matrix
    if inspection.shifts is not None:
        pictures["shifts"] = figures.shift_plane(inspection.shifts, slug("shifts", *prefix, *_name(run)))
    return CloseUp(run, inspection, "", pictures, cost)


def class_accuracy(run: Run, tested: Tested) -> Sequence[float | None]:
    """Percent, of each class: as the run recorded it, or if it did not, of the images that were looked at."""
    recorded = (run.results or {}).get("evaluations", {}).get(tested.subset, {}).get("per_class_accuracy")
    fits = isinstance(recorded, list) and len(recorded) == len(tested.classnames)
    return recorded if fits else tested.metrics.per_class_accuracy
