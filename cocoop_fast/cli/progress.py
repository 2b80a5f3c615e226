"""What a user sees while a run goes on: bars in a terminal, a few plain lines elsewhere, nothing if asked.

All of it goes to stderr; stdout is for results. May import ``training.observer``; the command line imports it.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from cocoop_fast.readable import classes_in_and_out, printable
from cocoop_fast.training.observer import EpochInfo, EvaluationInfo, Observer, RunInfo, StepInfo
from cocoop_fast.variants import name_of

PLAIN_LINES = 10  # of a method's training, at most


@contextlib.contextmanager
def observe(*, quiet: bool = False, stream: TextIO | None = None) -> Iterator[Observer]:
    """The observer that suits ``stream`` (stderr): bars in a terminal, lines elsewhere, silence if ``quiet``."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        yield Observer()
    elif stream.isatty():
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(file=stream, highlight=False),
            refresh_per_second=8,
        )
        with progress:
            yield Bars(progress)
    else:
        yield Lines(stream)


class _Shown(Observer):
    """What lines and bars have in common: messages, and the first line of a method."""

    _method = ""
    _classes = ""  # said last

    def on_message(self, text: str) -> None:
        self._print(text)

    def on_run_start(self, info: RunInfo) -> None:
        self._method = name_of(info.config)
        classes = classes_in_and_out(info.classnames, info.other_classes)
        if classes != self._classes:  # the methods of one experiment have the same
            self._print(classes)
            self._classes = classes
        if info.epochs:
            self._print(
                f"{self._method}: {info.parameters:,} parameters, {info.train_images:,} images of "
                f"{len(info.classnames)} classes, {info.precision} on {info.device}, to {info.output_dir}"
            )

    def _print(self, text: str) -> None:
        raise NotImplementedError


class Lines(_Shown):
    """At most :data:`PLAIN_LINES` lines a method: for log files and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def on_epoch_end(self, info: EpochInfo) -> None:
        every = math.ceil(info.epochs / PLAIN_LINES)
        if info.epoch % every == 0 or info.epoch == info.epochs:
            self._print(
                f"{self._method}: epoch {info.epoch}/{info.epochs}, loss {info.loss:.4f}, "
                f"accuracy {info.accuracy:.1f} %, {_rate(info.images_per_second)}"
                + (f", {info.skipped_steps} skipped" if info.skipped_steps else "")
                + ("" if info.classes_kept is None else f", {_pruned(info)}")
            )

    def on_evaluation_end(self, info: EvaluationInfo) -> None:
        self._print(
            f"{info.method}: {info.metrics.accuracy:.2f} % on {info.subset} classes "
            f"({info.metrics.total:,} images, {info.seconds:.1f} s)"
        )

    def _print(self, text: str) -> None:
        self._stream.write(f"{printable(text)}\n")
        self._stream.flush()


class Bars(_Shown):
    """A bar for each method's training and for each evaluation; finished bars stay."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._epoch_loss = self._epoch_accuracy = 0.0
        self._epoch_steps = 0

    def on_run_start(self, info: RunInfo) -> None:
        super().on_run_start(info)
        if info.epochs:
            total = info.steps_per_epoch * info.epochs
            self._task = self._progress.add_task(
                f"{self._method} epoch -/{info.epochs}", total=total, completed=info.first_step, status=""
            )

    def on_epoch_start(self, epoch: int, epochs: int, first_batch: int, batches: int) -> None:
        self._epoch_loss = self._epoch_accuracy = 0.0
        self._epoch_steps = 0
        if self._task is not None:
            # Drawn at once: an epoch may be over before the next regular refresh.
            description = f"{self._method} epoch {epoch}/{epochs}"
            self._progress.update(self._task, description=description, refresh=True)

    def on_step(self, info: StepInfo) -> None:
        # Means over the epoch so far: the loss of a single image says little.
        self._epoch_loss += info.loss
        self._epoch_accuracy += info.accuracy
        self._epoch_steps += 1
        left = timedelta(seconds=round(max(info.eta_seconds, 0.0)))
        self._show(
            info.step,
            f"loss {self._epoch_loss / self._epoch_steps:.3f}  acc {self._epoch_accuracy / self._epoch_steps:.0f} %  "
            f"{_rate(info.images_per_second)}  ETA {left}"
            + (f"  {info.skipped_steps} skipped" if info.skipped_steps else ""),
        )

    def on_epoch_end(self, info: EpochInfo) -> None:
        if info.epoch == info.epochs:  # no time is left
            rate = _rate(info.images_per_second)
            self._show(None, f"loss {info.loss:.3f}  acc {info.accuracy:.0f} %  {rate}")

    def on_evaluation_start(self, method: str, subset: str, images: int) -> None:
        self._task = self._progress.add_task(f"{method}, {subset} classes", total=images, status="")

    def on_evaluation_progress(self, images_done: int, images: int) -> None:
        self._show(images_done, "")

    def on_evaluation_end(self, info: EvaluationInfo) -> None:
        self._show(info.metrics.total, f"accuracy {info.metrics.accuracy:.2f} %")
        self._task = None

    def _print(self, text: str) -> None:
        self._progress.console.print(printable(text), markup=False)

    def _show(self, completed: int | None, status: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=completed, status=status)


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:.{0 if images_per_second >= 10 else 2}f} images/s"


def _pruned(info: EpochInfo) -> str:
    return f"backward through {info.classes_kept:.0f} classes, {info.share_left_out:.2%} left out"
