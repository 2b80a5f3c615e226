"""What commands print: tables and one JSON line on stdout, warnings on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

NOTHING = "-"


@contextlib.contextmanager
def only_json(active: bool) -> Iterator[None]:
    """While active, what anybody prints goes to stderr, so that stdout holds the JSON line alone."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


def print_json(values: dict[str, Any]) -> None:
    """One line on stdout. A number that is not finite, which JSON does not know, becomes null."""
    print(json.dumps(_finite(values), ensure_ascii=False, allow_nan=False), flush=True)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: int = 1
) -> None:
    """A table on stdout; the first ``left`` columns are text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        # Folded rather than cut: nothing that is printed is lost in a narrow terminal.
        table.add_column(column, justify="left" if position < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout, highlight=False, markup=False)
    with console.capture() as rendered:
        console.print(table)
    # Printed by print, because Rich itself would end the program if the reader of stdout has gone.
    print(rendered.get(), end="")


def warn(lines: Sequence[str]) -> None:
    """One line each on stderr."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def percent(value: float | None) -> str:
    """An accuracy with two decimals, or a dash."""
    return NOTHING if value is None else f"{value:.2f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
