"""Train one cell and test it, or read what is finished of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from cocoop_fast.config import DataConfig
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.feature_cache import FeatureCache
from cocoop_fast.experiments import experiment
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.files.atomic import make_folder
from cocoop_fast.protocols.cells import Cell, on_device
from cocoop_fast.readable import classes_in_and_out
from cocoop_fast.runs.directory import RunDirectory
from cocoop_fast.runs.log import RunLog
from cocoop_fast.training.observer import EvaluationInfo, Observer, Observers, RunInfo


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
        said: messages and warnings of a cell that was run by :class:`CellWork`, in a process without a terminal.
    """

    cell: Cell
    status: Literal["finished", "failed", "pending"] = "pending"
    accuracy: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    error: str = ""
    usage: bool = True
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class CellWork:
    """What a process does with a cell, wherever it is. Picklable; CLIP and features are loaded once a process.

    Args:
        features: folder of the feature cache, which all processes share.
        device: to compute on; ``None``: the cell's own.
        observer: is told about progress, in the process.
        folder: the working directory, from which relative paths of the configuration go.
    """

    features: Path
    device: str | None = None
    observer: Observer = field(default_factory=Observer)
    folder: Path = field(default_factory=Path.cwd)

    def __call__(self, cell: Cell, overwrite: bool = False) -> Outcome:
        """Run the cell; ``overwrite``: anew."""
        os.chdir(self.folder)
        heard = _Heard()
        with warnings.catch_warnings(record=True) as warned:
            there = cell if self.device is None else on_device(cell, self.device)
            observer = Observers(heard, self.observer)
            outcome = run_cell(there, _shared(self.features), observer, overwrite=overwrite)
        said = dict.fromkeys([*heard.texts, *(f"warning: {one.message}" for one in warned)])
        return replace(outcome, cell=cell, said=tuple(said))

    def checkpoint(self, cell: Cell, overwrite: bool = False) -> Any:
        """What submitit submits when a job's time is over: the same cell, which goes on from its newest checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, cell)


@cache
def _shared(features: Path) -> Shared:
    return Shared(FeatureCache(features))


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


def is_finished(cell: Cell) -> bool:
    """Whether the cell and all its tests only need to be read."""
    return RunDirectory(cell.run_dir).results() is not None and all(
        _known_accuracy(cell, name, data) is not None for name, data in cell.tests
    )


def _known_accuracy(cell: Cell, name: str, data: DataConfig) -> float | None:
    """From ``test_<name>/results.json``, if the cell was tested on just these images."""
    match RunDirectory(cell.run_dir / f"test_{name}").results():
        case {"test": tested, "accuracy": float(accuracy)} if tested == _asked(cell, data):
            return accuracy
    return None


def _asked(cell: Cell, data: DataConfig) -> dict[str, Any]:
    """All that decides a test's result beside the run itself; where the images lie does not."""
    return {
        "dataset": data.name,
        "subset": data.subset,
        "skip_bad_images": data.skip_bad_images,
        "template": cell.config.prompt.template,
    }


def _run_test(cell: Cell, name: str, data: DataConfig, shared: Shared, observer: Observer) -> float:
    """The accuracy of a finished run on other images, from ``test_<name>/results.json`` if it was tested there."""
    known = _known_accuracy(cell, name, data)
    if known is not None:
        return known
    log = RunLog(cell.run_dir, cell.config.print_freq, str(cell.config.data.subset))
    [metrics] = experiment.evaluate_run(
        cell.run_dir,
        subset=data.subset,
        data=data,
        template=cell.config.prompt.template,
        observer=_Named(name, Observers(log, observer)),
        shared=shared,
    ).values()
    folder = RunDirectory(cell.run_dir / f"test_{name}")
    make_folder(folder.path)
    folder.write_results({"test": _asked(cell, data), **metrics.summary()})
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


class _Heard(Observer):
    """Keeps what a user should know, to be shown where there is a terminal."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)

    def on_run_start(self, info: RunInfo) -> None:
        self.texts.append(classes_in_and_out(info.classnames, info.other_classes))
