"""Amounts with a unit, as people read them, and text that does nothing but be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

# Control characters but tab and newline; marks that turn the direction of writing; halves of characters.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text with control characters as ``\u001b`` and the like, which JSON reads as the characters themselves.

    Names of files and classes come from others. Sent to a terminal as they are, they could set its title, fill the
    clipboard, or hide what stands beside them.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def listed(names: Sequence[str], shown: int = 10) -> str:
    """Names between commas; of more than ``shown`` the first ones, and how many there are besides."""
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[: shown - 1])} and {len(names) - shown + 1:,} more"


def classes_in_and_out(trained_on: Sequence[str], others: Sequence[str]) -> str:
    """Which classes are trained on and which are not."""
    if not others:
        return f"Classes trained on: all {len(trained_on):,} ({listed(trained_on)})."
    return (
        f"Classes trained on: {len(trained_on):,} of {len(trained_on) + len(others):,} ({listed(trained_on)}). "
        f"Not trained on: {len(others):,} ({listed(others)})."
    )


def readable_images(count: int) -> str:
    """A batch in words."""
    return "1 image" if count == 1 else f"{count} images"


def readable_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    return _amount(seconds, ((1, "s"), (1e-3, "ms")))


def readable_time(seconds: float) -> str:
    """Milliseconds to days."""
    if seconds < 100:
        return readable_seconds(seconds)
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def readable_bytes(count: float) -> str:
    """Three digits and a decimal unit."""
    return _amount(count, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def readable_flops(count: float) -> str:
    """Three digits and the unit's letter."""
    return _amount(count, ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")))


def _amount(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits, in the largest unit that the value reaches; ``units`` go from large to small."""
    unit, name = next((one for one in units if value >= one[0]), units[-1])
    number = value / unit
    return f"{number:.3g} {name}" if number < 100 else f"{number:,.0f} {name}"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for notebooks; the first column is text, the others numbers."""

    def line(cell: str, texts: Sequence[str]) -> str:
        sides = ("left", *["right"] * (len(texts) - 1))
        cells = zip(sides, texts, strict=True)
        return "".join(f'<{cell} style="text-align: {side}">{escape(text)}</{cell}>' for side, text in cells)

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', columns)}</tr></thead><tbody>{body}</tbody></table>"
