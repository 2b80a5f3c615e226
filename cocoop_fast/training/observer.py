"""How a run tells the world what it is doing. The library prints nothing itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cocoop_fast.config import ResolvedConfig
from cocoop_fast.evaluation.metrics import Metrics


@dataclass(frozen=True)
class RunInfo:
    """Known once a method's model is built, before its first step."""

    config: ResolvedConfig
    output_dir: Path
    classnames: tuple[str, ...]  # trained on
    other_classes: tuple[str, ...]  # of the data set, not trained on
    parameters: int  # learned numbers
    train_images: int
    steps_per_epoch: int
    epochs: int
    precision: str
    device: str
    notes: tuple[str, ...]  # what was assumed of the model, and how the data were understood, a sentence each
    first_step: int  # 0, or the number of steps already done by an earlier, interrupted run
    class_images: tuple[
        int, ...
    ] = ()  # training images of each class in classnames: some have fewer than `shots`


@dataclass
class StepInfo:
    """One optimizer step, just done. The trainer fills in what has a default as it becomes known."""

    step: int  # 1-based, over the whole run
    total_steps: int
    epoch: int  # 1-based
    epochs: int
    batch: int  # 1-based within the epoch
    batches: int
    loss: float = math.nan
    accuracy: float = math.nan  # of this batch in training mode, percent
    lr: float = 0.0
    seconds: float = 0.0  # of this step, waiting for data included
    data_seconds: float = 0.0  # of which waiting for data
    images_per_second: float = 0.0  # mean over the steps this process has done
    eta_seconds: float = 0.0
    skipped_steps: int = 0  # of the run before this one: float16 overflowed, or on_nonfinite is skip
    classes_kept: int | None = None  # with optim.prune_mass: backward went through them
    share_left_out: float | None = None  # and this share of the gradient's weights was left out


@dataclass(frozen=True, kw_only=True)
class EpochInfo:
    """One epoch, just done. Means are over the steps of this epoch that this process did and did not skip."""

    epoch: int
    epochs: int
    loss: float = 0.0
    accuracy: float = 0.0
    lr: float
    seconds: float
    images_per_second: float
    classes_kept: float | None = None  # the mean of the steps', with optim.prune_mass
    share_left_out: float | None = None  # likewise
    skipped_steps: int = 0  # of the run so far, likewise


@dataclass(frozen=True)
class EvaluationInfo:
    """Accuracy of one method on one set of classes."""

    method: str
    subset: str  # "base", "new" or "all"
    metrics: Metrics
    seconds: float


class Observer:
    """Override what you want to hear about; everything else is ignored.

    Calls come in this order: ``on_run_start``, then for each epoch ``on_epoch_start``, ``on_step`` each
    step, ``on_epoch_end``; then ``on_training_end``; then per set of classes ``on_evaluation_start``, ``on_evaluation_progress``,
    ``on_evaluation_end``; then ``on_run_end``. With several methods this repeats for each. ``on_message``
    may come at any time.
    """

    def on_message(self, text: str) -> None:
        """Something a user should know: resumed, images skipped, already finished."""

    def on_run_start(self, info: RunInfo) -> None: ...

    def on_epoch_start(self, epoch: int, epochs: int, first_batch: int, batches: int) -> None:
        """``first_batch`` batches of this epoch were done before an interruption (0 normally)."""

    def on_step(self, info: StepInfo) -> None: ...

    def on_epoch_end(self, info: EpochInfo) -> None: ...

    def on_checkpoint(self, path: Path) -> None: ...

    def on_training_end(self, seconds: float) -> None:
        """``seconds`` were spent training, in earlier processes too; the model is about to be evaluated."""

    def on_evaluation_start(self, method: str, subset: str, images: int) -> None: ...

    def on_evaluation_progress(self, images_done: int, images: int) -> None: ...

    def on_evaluation_end(self, info: EvaluationInfo) -> None: ...

    def on_run_end(self, output_dir: Path) -> None: ...


class Observers(Observer):
    """Passes every call on to several observers, in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        for name in vars(Observer):
            if name.startswith("on_"):
                setattr(self, name, partial(self._tell, name))

    def _tell(self, name: str, *args: Any) -> None:
        for observer in self._observers:
            getattr(observer, name)(*args)


class Means:
    """Running means of named numbers; ``count`` says of how many."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, float] = {}

    def add(self, **values: float | None) -> None:
        """The same names each time; ``None`` is left out."""
        self.count += 1
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value

    def now(self) -> dict[str, float]:
        """The means by name; empty before anything was added."""
        return {name: total / self.count for name, total in self._sums.items()}
