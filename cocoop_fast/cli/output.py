"""What commands print: tables and one JSON line on stdout, warnings on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cocoop_fast.readable import printable

TOO_BUSY = 0.05  # share of the processors that other programs may use before times mean little


@contextlib.contextmanager
def only_json(active: bool) -> Iterator[None]:
    """While active, everything that is printed goes to stderr, so that stdout holds the JSON line alone."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def loading(*, silent: bool = False) -> Iterator[None]:
    """A word in a terminal while libraries load, which takes seconds; it is gone when they have."""
    if silent or not sys.stderr.isatty():
        yield
        return
    print("loading…", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def print_json(values: dict[str, Any]) -> None:
    """One line on stdout. A number that is not finite, which JSON does not know, becomes null."""
    print(printable(json.dumps(_finite(values), ensure_ascii=False, allow_nan=False)), flush=True)


def say(text: str) -> None:
    """Text on stdout, without control characters of the names in it."""
    print(printable(text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str | None]], *, left: int = 1) -> None:
    """A table on stdout; the first ``left`` columns are text, the others numbers.

    What is ``None`` is shown as a dash; a column of nothing else is left out.
    """
    kept = [i for i, _ in enumerate(columns) if not rows or any(row[i] is not None for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in kept:
        # Folded rather than cut: nothing that is printed is lost in a narrow terminal.
        table.add_column(printable(columns[i]), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(printable(row[i] or "") if row[i] is not None else "-" for i in kept))
    # A file and a pipe have no width: a program that reads them finds a row in each line.
    console = Console(
        file=sys.stdout, highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000
    )
    with console.capture() as rendered:
        console.print(table)
    # Printed by print, because Rich itself would end the program if the reader of stdout has gone.
    print(rendered.get(), end="")


def note(line: str) -> None:
    """One line on stderr, for who reads the result."""
    print(printable(line), file=sys.stderr)


def warn(lines: Sequence[str]) -> None:
    """One line each on stderr."""
    for line in lines:
        print(printable(f"warning: {line}"), file=sys.stderr)


def teller(command: str, *, silent: bool) -> Callable[[str], None]:
    """What a command tells its progress to: a line on stderr, unless it is to be silent."""

    def tell(line: str) -> None:
        if not silent:
            print(printable(f"{command}: {line}"), file=sys.stderr, flush=True)

    return tell


def shown(value: Any, form: Callable[[Any], str] = "{:.2f}".format) -> str | None:
    """A value, if there is one; without a form a number with two decimals."""
    return None if value is None else form(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
