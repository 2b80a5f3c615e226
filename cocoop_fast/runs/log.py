"""The two logs of a run: ``log.txt`` in the reference's wording, ``metrics.jsonl`` for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from cocoop_fast.clip.load import describe
from cocoop_fast.engine.memory import peak_of_process
from cocoop_fast.evaluation.metrics import Metrics
from cocoop_fast.files.atomic import make_folder, through_no_link
from cocoop_fast.files.provenance import provenance
from cocoop_fast.readable import classes_in_and_out, printable
from cocoop_fast.runs.directory import DELETION_SECONDS
from cocoop_fast.runs.recipe import in_words
from cocoop_fast.training.observer import EpochInfo, EvaluationInfo, Means, Observer, RunInfo, StepInfo
from cocoop_fast.variants import name_of


class RunLog(Observer):
    """Writes what happens into a run directory. Both files are only ever appended to.

    A training step is logged every ``print_freq`` batches, or each time if an epoch has fewer. Both
    "Finish training" and "Finished training" are written, because the field's result parsers look for the one
    or the other. They take the last accuracy of a file, so that of classes which were not trained on goes to
    ``test_<subset>/log.txt``, as the reference's separate evaluation run does.

    Args:
        folder: the run directory.
        print_freq: batches between lines.
        trained_on: the subset of classes whose accuracy belongs into ``log.txt``.
        next_rate: the learning rate of an epoch, to print the next one's at an epoch's last batch, as the reference does.
        before_writing: raises if the run directory is gone.
    """

    def __init__(
        self,
        folder: Path,
        print_freq: int,
        trained_on: str,
        next_rate: Callable[[int], float] | None = None,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._print_freq = print_freq
        self._trained_on = trained_on
        self._next_rate = next_rate
        self._before_writing = before_writing
        self._device = "cpu"
        self._means = Means()
        self._written: set[Path] = set()
        _end_torn_line(folder / "metrics.jsonl")
        _end_torn_line(folder / "log.txt")

    def on_message(self, text: str) -> None:
        self._text(text)

    def on_run_start(self, info: RunInfo) -> None:
        self._device = info.device
        for line in (
            describe(info.config.model),
            in_words(info.config),
            classes_in_and_out(info.classnames, info.other_classes),
            *info.notes,
        ):
            self._text(line)
        self._text(f"Learned parameters: {info.parameters:,}; training images: {info.train_images:,}")
        if info.first_step:
            self._text(f"Resumed after step {info.first_step}")
        self._record(
            "run",
            method=name_of(info.config),
            model=info.config.model.name,
            pretrained=info.config.model.pretrained,
            seed=info.config.seed,
            device=info.device,
            precision=info.precision,
            parameters=info.parameters,
            train_images=info.train_images,
            classes=len(info.classnames),
            class_images=info.class_images,
            epochs=info.epochs,
            steps_per_epoch=info.steps_per_epoch,
            first_step=info.first_step,
            provenance=provenance(),
        )

    def on_epoch_start(self, epoch: int, epochs: int, first_batch: int, batches: int) -> None:
        self._means = Means()

    def on_step(self, info: StepInfo) -> None:
        self._means.add(time=info.seconds, data=info.data_seconds, loss=info.loss, acc=info.accuracy)
        if info.batch % self._print_freq and info.batches >= self._print_freq:
            return
        lr, mean = info.lr, self._means.now()
        if self._next_rate is not None and info.batch == info.batches:
            lr = self._next_rate(info.epoch + 1)
        self._text(
            f"epoch [{info.epoch}/{info.epochs}] batch [{info.batch}/{info.batches}] "
            f"time {info.seconds:.3f} ({mean['time']:.3f}) data {info.data_seconds:.3f} ({mean['data']:.3f}) "
            f"loss {info.loss:.4f} ({mean['loss']:.4f}) acc {info.accuracy:.4f} ({mean['acc']:.4f}) "
            f"lr {lr:.4e} eta {timedelta(seconds=int(info.eta_seconds))}"
        )
        self._record("step", **info.__dict__)

    def on_epoch_end(self, info: EpochInfo) -> None:
        self._record("epoch", **info.__dict__)

    def on_training_end(self, seconds: float) -> None:
        self._text("Finish training")
        self._text("Finished training")
        self._text(f"Elapsed: {timedelta(seconds=round(seconds))}")
        self._record("trained", seconds=seconds, peak_memory=peak_of_process(self._device))

    def on_evaluation_end(self, info: EvaluationInfo) -> None:
        folder = self._folder
        if info.subset != self._trained_on:
            folder = folder / f"test_{info.subset}"
            self._before_writing()
            make_folder(folder)
        self._append(folder / "log.txt", evaluation_text(info.metrics))
        self._record("evaluation", subset=info.subset, seconds=info.seconds, **info.metrics.summary())

    def _text(self, line: str) -> None:
        self._append(self._folder / "log.txt", printable(line))

    def _record(self, event: str, **values: Any) -> None:
        record = {"event": event, "unix_time": time.time(), **values}
        self._append(self._folder / "metrics.jsonl", json.dumps(record, ensure_ascii=False))

    def _append(self, path: Path, text: str) -> None:
        self._before_writing()
        if path in self._written and not path.exists():
            time.sleep(DELETION_SECONDS)  # is the run directory being deleted, or was it this file alone?
            self._before_writing()
        try:
            with open(path, "a", encoding="utf-8", opener=through_no_link) as file:
                file.write(text + "\n")
        except OSError as error:
            error.filename = str(path)  # a full disk does not say which file has no room
            raise
        self._written.add(path)


def evaluation_text(metrics: Metrics) -> str:
    """A test result in the reference's wording, with its one decimal."""
    return (
        "=> result\n"
        f"* total: {metrics.total:,}\n"
        f"* correct: {metrics.correct:,}\n"
        f"* accuracy: {metrics.accuracy:.1f}%\n"
        f"* error: {metrics.error:.1f}%\n"
        f"* macro_f1: {metrics.macro_f1:.1f}%"
    )


def _end_torn_line(path: Path) -> None:
    """A killed process may have left half a line: end it, so that the next record has its own."""
    if path.exists():
        with open(path, "rb+", opener=through_no_link) as file:
            if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")
