"""The chapters of a report: each source with its plots and its runs looked at closely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cocoop_fast.errors import UserError
from cocoop_fast.protocols.table import AVERAGE, shots_of
from cocoop_fast.report import figures
from cocoop_fast.report.cost import Cost, estimate
from cocoop_fast.report.inspection import Inspection, Inspector
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
    inspection: Inspection | None = None
    problem: str = ""
    pictures: dict[str, Picture] = field(default_factory=dict)
    cost: Cost | None = None


@dataclass(frozen=True)
class Chapter:
    """A source with its plots.

    Args:
        source: the table and its runs.
        bars: of accuracies, or their curves over the number of shots.
        curves: of each method on each data set.
        close_ups: of one run of each method on each data set, as many as were asked for.
        left_out: how many more there would be.
    """

    source: Source
    bars: tuple[Picture, ...]
    curves: tuple[Picture, ...]
    close_ups: tuple[CloseUp, ...]
    left_out: int

    @property
    def opened(self) -> int:
        """Which close-up is open on a screen; on paper all are."""
        return next((i for i, one in enumerate(self.close_ups) if one.run.label == self.source.focus), 0)

    @property
    def pictures(self) -> Iterator[Picture]:
        """All plots, in the order of the page."""
        yield from self.bars
        yield from self.curves
        for close_up in self.close_ups:
            yield from close_up.pictures.values()


def make_chapters(
    sources: Sequence[Source], inspector: Inspector, close_ups: int, tell: Callable[[str], None]
) -> tuple[Chapter, ...]:
    """A chapter for each source.

    Args:
        sources: what was read.
        inspector: looks at runs.
        close_ups: how many runs it looks at, in all chapters together.
        tell: is told which run is being looked at.
    """
    chapters: list[Chapter] = []
    for number, source in enumerate(sources, 1):
        prefix = (str(number),) if len(sources) > 1 else ()
        groups: dict[tuple[str, str], list[Run]] = {}  # of runs that differ in their seed alone
        for run in source.runs:
            groups.setdefault((run.dataset, run.label), []).append(run)
        begun = [group for group in groups.values() if any(run.history.start for run in group)]
        chosen = begun[: close_ups - sum(len(chapter.close_ups) for chapter in chapters)]
        curves = [
            figures.learning_curves(group, slug("curves", *prefix, *name)) for name, group in groups.items()
        ]
        looked_at = []
        for group in chosen:
            # One that is finished if there is one; a run in its middle says something, too.
            run = next((run for run in group if run.results is not None), group[0])
            tell(f"looking at {run.path}")
            looked_at.append(_look_at(run, inspector, prefix))
        chapters.append(
            Chapter(
                source=source,
                bars=tuple(_bars(source, prefix)),
                curves=tuple(one for one in curves if one is not None),
                close_ups=tuple(looked_at),
                left_out=len(begun) - len(chosen),
            )
        )
    return tuple(chapters)


def _bars(source: Source, prefix: tuple[str, ...]) -> Iterator[Picture]:
    entries = source.entries
    if entries and all(entry.metric == "accuracy" for entry in entries):
        yield figures.accuracy_bars(entries, "dataset", slug("accuracy", *prefix))
        return
    datasets = dict.fromkeys(entry.dataset for entry in entries)
    for dataset in sorted(datasets, key=lambda name: name != AVERAGE):  # the average answers first
        own = [entry for entry in entries if entry.dataset == dataset]
        if all(shots_of(entry.metric) for entry in own):
            yield figures.shot_curves(own, slug("accuracy", *prefix, dataset))
        else:
            yield figures.accuracy_bars(own, "metric", slug("accuracy", *prefix, dataset))


def _look_at(run: Run, inspector: Inspector, prefix: tuple[str, ...]) -> CloseUp:
    try:
        inspection = inspector.inspect(run)
        cost = estimate(inspection)
    except UserError as error:
        return CloseUp(run, problem=str(error))
    pictures: dict[str, Picture | None] = {}
    name = (*prefix, run.dataset, run.label)
    for tested in inspection.tested:
        subset = tested.subset
        pictures[f"classes {subset}"] = figures.class_bars(tested, run.method, slug("classes", *name, subset))
        pictures[f"confusion {subset}"] = figures.confusion_matrix(tested, slug("confusion", *name, subset))
    if inspection.shifts is not None:
        pictures["shifts"] = figures.shift_plane(inspection.shifts, slug("shifts", *name))
    made = {kind: one for kind, one in pictures.items() if one is not None}
    return CloseUp(run, inspection, pictures=made, cost=cost)
