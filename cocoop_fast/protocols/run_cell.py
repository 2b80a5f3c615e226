"""Train one cell and test it, or read what is finished of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cocoop_fast.config import DataConfig
from cocoop_fast.errors import UserError
from cocoop_fast.experiments import experiment
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.files.atomic import make_folder
from cocoop_fast.protocols.cells import Cell
from cocoop_fast.runs.directory import RunDirectory
from cocoop_fast.runs.log import RunLog
from cocoop_fast.training.observer import EvaluationInfo, Observer, Observers


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        cell: which.
        status: "pending" until it has been run.
        accuracy: percent, by what was tested on: "base", "new" and "all" classes of the data set trained on,
            or names of data sets.
        train_seconds: in all processes that trained it.
        error: why it failed, in a sentence.
        usage: whether it failed for what a user asked, not for an accident.
    """

    cell: Cell
    status: Literal["finished", "failed", "pending"] = "pending"
    accuracy: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    error: str = ""
    usage: bool = True


def run_cells(
    cells: Sequence[Cell], shared: Shared, observer: Observer, *, overwrite: frozenset[Cell] = frozenset()
) -> Iterator[Outcome]:
    """Run cells one after the other in this process; one that fails does not stop the others.

    Args:
        cells: those that are finished are read, half-trained ones go on.
        shared: CLIP and features, used by all of them.
        observer: is told about progress.
        overwrite: cells to train anew.
    """
    for number, cell in enumerate(cells, 1):
        observer.on_message(f"[{number}/{len(cells)}] {cell}")
        yield run_cell(cell, shared, observer, overwrite=cell in overwrite)


def run_cell(cell: Cell, shared: Shared, observer: Observer, *, overwrite: bool = False) -> Outcome:
    """Train one cell and run its tests; a failure becomes part of its outcome."""
    try:
        results = experiment.run(cell.config, observer=observer, overwrite=overwrite, shared=shared)
        row = results.rows[0]
        on_base = cell.config.data.subset == "base"
        accuracy = {"base": row.base, "new": row.new} if on_base else {cell.dataset: row.all}
        measured = {name: value for name, value in accuracy.items() if value is not None}
        measured |= {name: _run_test(cell, name, data, shared, observer) for name, data in cell.tests}
    except UserError as error:
        return Outcome(cell, "failed", error=str(error))
    except Exception as error:  # whatever it was, the other cells may do better
        return Outcome(cell, "failed", error=f"{type(error).__name__}: {error}", usage=False)
    return Outcome(cell, "finished", measured, row.train_seconds)


def _run_test(cell: Cell, name: str, data: DataConfig, shared: Shared, observer: Observer) -> float:
    """The accuracy of a finished run on other images, from ``test_<name>/results.json`` if it was tested there."""
    folder = RunDirectory(cell.run_dir / f"test_{name}")
    asked = {  # all that decides the result beside the run itself; where the images lie does not
        "dataset": data.name,
        "subset": data.subset,
        "skip_bad_images": data.skip_bad_images,
        "template": cell.config.prompt.template,
    }
    match folder.results():
        case {"test": tested, "accuracy": float(accuracy)} if tested == asked:
            return accuracy
    log = RunLog(cell.run_dir, cell.config.print_freq, str(cell.config.data.subset))
    [metrics] = experiment.evaluate_run(
        cell.run_dir,
        subset=data.subset,
        data=data,
        template=cell.config.prompt.template,
        observer=_Named(name, Observers(log, observer)),
        shared=shared,
    ).values()
    make_folder(folder.path)
    folder.write_results({"test": asked, **metrics.summary()})
    return metrics.accuracy


class _Named(Observer):
    """Tells of evaluations by the name of the test, which is not one of the run's own classes.

    Nothing but evaluations and messages happens in a test.
    """

    def __init__(self, name: str, observer: Observer) -> None:
        self._name = name
        self._observer = observer

    def on_message(self, text: str) -> None:
        self._observer.on_message(text)

    def on_evaluation_start(self, method: str, subset: str, images: int) -> None:
        self._observer.on_evaluation_start(method, self._name, images)

    def on_evaluation_progress(self, images_done: int, images: int) -> None:
        self._observer.on_evaluation_progress(images_done, images)

    def on_evaluation_end(self, info: EvaluationInfo) -> None:
        self._observer.on_evaluation_end(replace(info, subset=self._name))
