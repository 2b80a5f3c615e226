"""Names as people read them, and a method's colour."""

from __future__ import annotations

import re

from cocoop_fast.methods.records import METHODS, method_title
from cocoop_fast.readable import printable
from cocoop_fast.report.style import INK, PALETTE

SUBSETS = {"base": "base classes", "new": "new classes", "all": "all classes"}


def method_name(label: str) -> str:
    """``cocoop (lr 0.1)`` as ``CoCoOp (lr 0.1)``."""
    title = method_title(label)
    return title[:1].upper() + title[1:]


def method_colour(label: str) -> str:
    """A method's own colour, whatever else is in its label."""
    record = METHODS.get(label.split(" ")[0])
    return PALETTE[record.colour] if record else INK


def data_name(dataset: str) -> str:
    """``oxford_pets`` as ``oxford pets``; an average says so."""
    return printable(dataset.replace("_", " "))


def slug(*parts: str) -> str:
    """A file's name."""
    return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-").lower() for part in parts)


def shorten(text: str, limit: int = 24) -> str:
    """Cut in the middle, where names differ least; without control characters, for a drawing."""
    text = printable(text)
    if len(text) <= limit:
        return text
    kept = limit - 1
    return f"{text[: kept - kept // 3]}…{text[-(kept // 3) :]}"
