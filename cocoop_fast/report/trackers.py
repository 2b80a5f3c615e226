"""Training runs in Weights & Biases, MLflow and trackio: one small observer each, over what they have in common.

Which server, which account and whether there is a network at all is theirs to say, by their own variables (``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ``TRACKIO_DIR``).
"""

from __future__ import annotations

import importlib
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoop_fast.config import flatten, to_mapping
from cocoop_fast.errors import UserError
from cocoop_fast.files.atomic import write_atomically
from cocoop_fast.training.observer import EpochInfo, EvaluationInfo, Observer, RunInfo, StepInfo
from cocoop_fast.variants import name_of

PROJECT = "cocoop_fast"


class Tracker(Observer):
    """Tells a tracker of the configuration, each ``print_freq``-th step, the means of each epoch, and test accuracies.

    A run that goes on after an interruption goes on there as well. A tracker that fails in the middle of a run is left out
    of the rest of it, with a warning.

    Raises:
        UserError: the package is not installed.
    """

    title: str
    package: str

    def __init__(self) -> None:
        try:
            self.module: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise UserError(
                f"Tracking by {self.title} needs the package {self.package}, which is not installed; run `pip install "
                f"{self.package}`.",
                exit_status=1,
            ) from error
        self._open = False
        self._step = 0
        self._every = 1

    def begin(self, name: str, folder: Path, config: Mapping[str, Any], known: str | None) -> str:
        """Begin a run there, or go on with the ``known`` one; returns what it is known by."""
        raise NotImplementedError

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, of one step of the run that was begun."""
        raise NotImplementedError

    def end(self) -> None:
        """The run there is over."""
        raise NotImplementedError

    def on_run_start(self, info: RunInfo) -> None:
        note = info.output_dir / f"{self.package}.id"
        known = note.read_text(encoding="utf-8").strip() if info.first_step and note.is_file() else None
        name = f"{info.config.data.name}-{name_of(info.config)}-seed{info.config.seed}"
        try:
            run = self.begin(name, info.output_dir, dict(flatten(to_mapping(info.config))), known)
        except Exception as error:  # of the tracker's own kind: no login, no server, no such run
            raise UserError(
                f"{self.title} cannot begin a run ({_reason(error)}); see to that, or leave --track out.",
                exit_status=1,
            ) from error
        write_atomically(note, lambda file: file.write(f"{run}\n".encode()))
        self._open, self._step, self._every = True, info.first_step, info.config.print_freq

    def on_step(self, info: StepInfo) -> None:
        self._step = info.step
        if info.step % self._every == 0 or info.batch == info.batches:
            self._tell("step", info, "loss", "accuracy", "lr", "images_per_second")

    def on_epoch_end(self, info: EpochInfo) -> None:
        self._tell("epoch", info, "loss", "accuracy")

    def on_evaluation_end(self, info: EvaluationInfo) -> None:  # also of a finished run, which is not begun
        self._tell(f"test/{info.subset}", info.metrics, "accuracy", "macro_f1")

    def on_run_end(self, output_dir: Path) -> None:
        if self._open:
            self._safely(self.end)
        self._open = False

    def _tell(self, group: str, values: object, *names: str) -> None:
        if self._open:
            numbers = {f"{group}/{name}": float(getattr(values, name)) for name in names}
            self._safely(lambda: self.log(numbers, self._step))

    def _safely(self, tell: Any) -> None:
        try:
            tell()
        except Exception as error:  # a run is worth more than its curves
            self._open = False
            warnings.warn(
                f"{self.title} is told no more of this run, which goes on ({_reason(error)}).", stacklevel=2
            )


class WandbTracker(Tracker):
    """Weights & Biases; offline with ``WANDB_MODE=offline``, where files lie in the run directory."""

    title, package = "Weights & Biases", "wandb"

    def begin(self, name: str, folder: Path, config: Mapping[str, Any], known: str | None) -> str:
        self._run = self.module.init(
            project=PROJECT, name=name, dir=str(folder), config=dict(config), id=known, resume="allow"
        )
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self) -> None:
        self._run.finish()


class MlflowTracker(Tracker):
    """MLflow, at ``MLFLOW_TRACKING_URI``."""

    title, package = "MLflow", "mlflow"

    def begin(self, name: str, folder: Path, config: Mapping[str, Any], known: str | None) -> str:
        self.module.set_experiment(PROJECT)
        run = self.module.start_run(run_id=known, run_name=None if known else name)
        if known is None:
            self.module.log_params(dict(config))
        return str(run.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.module.log_metrics(dict(values), step=step)

    def end(self) -> None:
        self.module.end_run()


class TrackioTracker(Tracker):
    """trackio, on this machine unless its variables name a Space."""

    title, package = "trackio", "trackio"

    def begin(self, name: str, folder: Path, config: Mapping[str, Any], known: str | None) -> str:
        own = known or f"{name}-{secrets.token_hex(3)}"  # runs of trackio are known by their names
        self._run = self.module.init(
            project=PROJECT, name=own, config=dict(config), resume="must" if known else "never"
        )
        return own

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.module.log(dict(values), step=step)

    def end(self) -> None:
        self.module.finish()


TRACKERS: dict[str, type[Tracker]] = {
    one.package: one for one in (WandbTracker, MlflowTracker, TrackioTracker)
}


def trackers(names: list[str]) -> list[Tracker]:
    """By their packages' names, each once.

    Raises:
        UserError: an unknown name, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name} is unknown; choose {', '.join(TRACKERS)}.")
    return [TRACKERS[name]() for name in dict.fromkeys(names)]


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")[:200]
