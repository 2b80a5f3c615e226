"""One row of progress a cell, whichever process or machine it runs on: read from what it writes into its run directory."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cocoop_fast.cli.progress import PLAIN_LINES
from cocoop_fast.protocols.cells import Cell
from cocoop_fast.protocols.run_cell import Outcome
from cocoop_fast.readable import printable

_LOOK_SECONDS = 1.0
_TAIL = 1 << 16  # bytes; a record has a few hundred, and ten a class


@contextlib.contextmanager
def rows_of(
    cells: Sequence[Cell], *, quiet: bool = False, stream: TextIO | None = None
) -> Iterator[Callable[[Outcome], None]]:
    """Show cells while they run: in a terminal a row each that changes, elsewhere a few lines each.

    Yields:
        What to tell of a cell that has ended.
    """
    if quiet:
        yield lambda outcome: None
        return
    rows = _Rows(cells, sys.stderr if stream is None else stream)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            rows.look()

    watcher = threading.Thread(target=watch, daemon=True)
    with rows.progress or contextlib.nullcontext():
        watcher.start()
        try:
            yield rows.ended
        finally:
            over.set()
            watcher.join()


class _Rows:
    def __init__(self, cells: Sequence[Cell], stream: TextIO) -> None:
        self._stream = stream
        # Every cell that may still move, with the size its log had before: it runs once the log grows.
        self._sizes = {cell: _size(cell) for cell in cells}
        self._rows: dict[Cell, TaskID] = {}
        self._shown: dict[Cell, str] = {}
        self._said: set[str] = set()
        self._count, self._ended = len(cells), 0
        self._lock = threading.Lock()
        self.progress: Progress | None = None
        if stream.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
            )
            self.progress = Progress(*columns, console=Console(file=stream, highlight=False))
            self._all = self.progress.add_task(
                "All cells", total=len(cells), status=f"0 of {len(cells)} ended"
            )

    def look(self) -> None:
        """Show what has changed since the last time."""
        with self._lock:
            for cell, size in self._sizes.items():
                if _size(cell) != size and (record := _last_record(cell)):
                    self._show(cell, *_in_words(record))

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            self._ended += 1
            self._sizes.pop(outcome.cell, None)
            for text in outcome.said:
                if text not in self._said:  # the same of every cell, once
                    self._print(f"[{outcome.cell}] {text}")
                    self._said.add(text)
            accuracies = ", ".join(f"{name} {value:.2f} %" for name, value in outcome.accuracy.items())
            error = " ".join(outcome.error.split())
            end = accuracies if outcome.status == "finished" else f"failed: {error}"
            self._print(f"[{self._ended}/{self._count}] {outcome.cell}: {end}")
            if self.progress is not None:
                if outcome.cell in self._rows:
                    self.progress.remove_task(self._rows.pop(outcome.cell))
                status = f"{self._ended} of {self._count} ended"
                self.progress.update(self._all, completed=self._ended, status=status)

    def _show(self, cell: Cell, done: float, status: str, plain: str) -> None:
        if self.progress is not None:
            if cell not in self._rows:
                self._rows[cell] = self.progress.add_task(printable(str(cell)), total=1.0, status="")
            self.progress.update(self._rows[cell], completed=done, status=status)
        elif plain != self._shown.get(cell):
            self._shown[cell] = plain
            self._print(f"[{cell}] {status}")

    def _print(self, text: str) -> None:
        if self.progress is not None:
            self.progress.console.print(printable(text), markup=False)
        else:
            self._stream.write(f"{printable(text)}\n")
            self._stream.flush()


def _in_words(record: dict[str, Any]) -> tuple[float, str, str]:
    """Share of the training done, the row's text, and what must change before a new plain line is worth while."""
    match record:
        case {"event": "step", "step": step, "total_steps": total}:
            epoch, epochs = record["epoch"], record["epochs"]
            text = f"epoch {epoch}/{epochs}  loss {record['loss']:.3f}  {record['images_per_second']:.1f} images/s"
            return step / total, text, f"epoch {epoch * PLAIN_LINES // epochs}"
        case {"event": "epoch", "epoch": epoch, "epochs": epochs}:
            text = f"epoch {epoch}/{epochs}  loss {record['loss']:.3f}  {record['images_per_second']:.1f} images/s"
            return epoch / epochs, text, f"epoch {epoch * PLAIN_LINES // epochs}"
        case {"event": "run", "epochs": epochs} if epochs:
            return 0.0, f"training begins, {record['train_images']} images", "run"
        case {"event": "evaluation", "subset": subset, "accuracy": accuracy}:
            return 1.0, f"{accuracy:.2f} % on {subset} classes", f"evaluation {subset}"
    return 1.0, "testing", "testing"


def _file(cell: Cell) -> Path:
    return cell.run_dir / "metrics.jsonl"


def _size(cell: Cell) -> int:
    try:
        return _file(cell).stat().st_size
    except OSError:
        return 0


def _last_record(cell: Cell) -> dict[str, Any] | None:
    """Of the log; ``None`` while there is none."""
    try:
        with _file(cell).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().split(b"\n")[:-1]  # the last may be half written
        return json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return None
