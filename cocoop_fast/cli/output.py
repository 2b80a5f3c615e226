"""What commands print: tables and one JSON line on stdout, warnings on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from cocoop_fast.readable import printable

# Of a table's cells, by the gap between its columns.
_PADDING: dict[int, tuple[int, int, int, int]] = {3: (0, 1, 0, 1), 2: (0, 1, 0, 0), 1: (0, 0, 0, 0)}
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
    print(_fitted(text, sys.stdout))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str | None]], *, left: int = 1) -> None:
    """A table on stdout; the first ``left`` columns are text, the others numbers.

    What is ``None`` is shown as a dash; a column of nothing else is left out. A row is a line where stdout is a file or a pipe, and a
    paragraph in a terminal that is so narrow that words, addresses or numbers would have to be broken.
    """
    kept = [i for i, _ in enumerate(columns) if not rows or any(row[i] is not None for row in rows)]
    titles = [printable(columns[i]) for i in kept]
    lines = [["-" if row[i] is None else printable(row[i] or "") for i in kept] for row in rows]
    width = _width(sys.stdout)
    cells = list(zip(titles, *lines, strict=True))
    whole = [max(map(cell_len, column)) for column in cells]
    words = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in cells]

    def fits(widths: Sequence[int], gap: int) -> bool:
        return width is None or sum(widths) + gap * (len(widths) - 1) + 2 <= width

    gap = next((gap for gap in _PADDING if fits(whole, gap)), 2)
    if width is not None and not fits(words, gap):
        print(*_paragraphs(titles, lines, width), "", sep="\n")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=_PADDING[gap])
    for i, title in zip(kept, titles, strict=True):
        table.add_column(title, justify="left" if i < left else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console = Console(file=sys.stdout, highlight=False, markup=False, width=width or 10_000)
    with console.capture() as rendered:
        console.print(table)
    # Printed by print, because Rich itself would end the program if the reader of stdout has gone.
    print(*(line.rstrip() for line in rendered.get().removesuffix("\n").split("\n")), sep="\n")


def _paragraphs(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Of each row its first cell, and under it the others with their titles, as many on a line as there is room for."""
    for first, *others in rows:
        if first:
            yield f"\n{first}"
        line = ""
        for title, cell in zip(titles[1:], others, strict=True):
            item = f"{title}: {cell}"
            if line and cell_len(f"  {line}; {item}") > width:
                yield _filled(line, width, "  ")
                line = item
            else:
                line = f"{line}; {item}" if line else item
        yield _filled(line, width, "  ")


def _filled(text: str, width: int, indent: str = "") -> str:
    """With line breaks between words alone: an address that is longer than a line stays whole."""
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=2 * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _width(stream: TextIO) -> int | None:
    """Of a terminal in characters. A file and a pipe have none: a program that reads them finds a sentence or row in each line."""
    return Console(file=stream).width if stream.isatty() else None


def _fitted(text: str, stream: TextIO) -> str:
    """Text as it is printed to a stream: without control characters, and in a terminal without broken words."""
    width = _width(stream)
    lines = printable(text).split("\n")
    return "\n".join(lines if width is None else (_filled(line, width) for line in lines))


def note(line: str) -> None:
    """One line on stderr, for who reads the result."""
    print(_fitted(line, sys.stderr), file=sys.stderr)


def warn(lines: Sequence[str]) -> None:
    """One line each on stderr."""
    for line in lines:
        note(f"warning: {line}")


def teller(command: str, *, silent: bool) -> Callable[[str], None]:
    """What a command tells its progress to: a line on stderr, unless it is to be silent."""

    def tell(line: str) -> None:
        if not silent:
            print(_fitted(f"{command}: {line}", sys.stderr), file=sys.stderr, flush=True)

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
