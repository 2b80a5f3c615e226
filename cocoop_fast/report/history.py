"""What ``metrics.jsonl`` tells of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cocoop_fast.files.parsing import json_value


@dataclass(frozen=True)
class History:
    """The records of a run, each step and epoch once.

    A run that was interrupted goes on from its newest checkpoint and logs some steps a second time: the later
    record is the one that led to the result.

    Args:
        start: of the newest session: device, precision, parameters, train_images, steps_per_epoch, ...; empty if the
            run has not begun.
        steps: in order; only every ``print_freq``-th is logged.
        epochs: in order; loss and accuracy are means over the epoch.
        seconds: spent training; ``None`` while it is not finished.
        peak_memory: bytes that the process has had at most, on a GPU of its memory; ``None`` if it was not recorded.
    """

    start: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    epochs: tuple[dict[str, Any], ...]
    seconds: float | None
    peak_memory: int | None

    @property
    def step_seconds(self) -> float | None:
        """The median of the logged steps, waiting for data left out; ``None`` without steps."""
        computing = [step["seconds"] - step["data_seconds"] for step in self.steps]
        return median(computing) if computing else None

    def progress(self) -> str:
        """How far it has come, in words."""
        if not self.start:
            return "training has not begun"
        if self.seconds is not None:
            return "trained, but not evaluated on all of its test images"
        return f"{len(self.epochs)} of {self.start['epochs']} epochs done"


_NUMBERS = ("step", "epoch", "trained")  # records that hold nothing else


def _check_numbers(record: dict[str, Any]) -> None:
    for name, value in record.items():
        if name != "event" and value is not None and type(value) not in (int, float):
            raise TypeError(f"`{name}` of a record is no number")


def read_history(path: Path) -> History:
    """Read ``metrics.jsonl``; lines that are torn are passed over, and a file that is not there is empty.

    Raises:
        TypeError, KeyError: a record is not as a run writes it.
    """
    start: dict[str, Any] = {}
    steps: dict[int, dict[str, Any]] = {}
    epochs: dict[int, dict[str, Any]] = {}
    seconds = peak_memory = None
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            record = json_value(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("event") in _NUMBERS:
            _check_numbers(record)
        match record:
            case {"event": "run"}:
                start = record
            case {"event": "step"}:
                steps[record["step"]] = record
            case {"event": "epoch"}:
                epochs[record["epoch"]] = record
            case {"event": "trained"}:
                seconds, peak_memory = record["seconds"], record.get("peak_memory")
    return History(
        start=start,
        steps=tuple(steps[number] for number in sorted(steps)),
        epochs=tuple(epochs[number] for number in sorted(epochs)),
        seconds=seconds,
        peak_memory=peak_memory,
    )
