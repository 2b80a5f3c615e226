"""Names as people type them: case and punctuation do not tell two of ours apart."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def spelling(name: str) -> str:
    """What is left of a name without case and punctuation: its letters and digits."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def meant(name: str, known: Iterable[str]) -> str | None:
    """The known name that is spelled alike, the first if there are several; ``None``: there is none."""
    return next((one for one in known if spelling(one) == spelling(name)), None)


def choice(name: str, known: Iterable[str], all_are: str, otherwise: str = "choose from") -> str:
    """The end of a sentence that there is no such name: which may be meant, and all there are.

    Args:
        name: that is not known.
        known: those that are.
        all_are: before all of them, behind a suggestion.
        otherwise: before all of them, where nothing is spelled alike.
    """
    names = list(known)
    alike = near(name, names)
    return f"{f'did you mean {alike[0]}? {all_are}' if alike else otherwise} {', '.join(names)}"


def near(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Those known names that are spelled most alike, the nearest first; ``cutoff``: difflib's, 0 (all) to 1."""
    by_spelling = {spelling(one): one for one in reversed(list(known))}
    found = difflib.get_close_matches(spelling(name), by_spelling, n=count, cutoff=cutoff)
    return [by_spelling[one] for one in found]
