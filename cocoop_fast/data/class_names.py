"""Class names that are no words: where they may come from a file, and a warning if they go into prompts as they are."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from cocoop_fast.data.dataset import Sample, plain
from cocoop_fast.data.listing import read_json, text_lines
from cocoop_fast.errors import UserError

_SHOWN = 3
_NUMBERED = re.compile(r"^\d+[\s._-]")  # 001.Black footed Albatross
_WORD = re.compile(r"[^\W\d_]{2}")


def read_class_names(path: Path, folders: Sequence[str]) -> dict[str, str]:
    """The class name of each folder.

    Args:
        path: lines that begin with a folder's name and go on, after space, tab, comma, semicolon or colon, with the
            class's; or a JSON object. Folders that are not there may be named as well.
        folders: all that need a name.

    Raises:
        UserError: it cannot be read, or gives a folder no name, or two.
    """
    if path.suffix.lower() == ".json":
        values = read_json(path)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values.values()):
            raise UserError(f"{path} is not a JSON object of folders and class names.", exit_status=1)
        given = {plain(folder): name for folder, name in values.items()}
        pairs = [(folder, given[plain(folder)]) for folder in folders if plain(folder) in given]
    else:
        pairs = [pair for line in text_lines(path) for pair in _pair(line, folders)]
    names: dict[str, str] = {}
    for folder, name in pairs:
        if names.setdefault(folder, name) != name:
            raise UserError(f"{path} names {folder!r} both {names[folder]!r} and {name!r}.", exit_status=1)
    nameless = [folder for folder in folders if not names.get(folder, "").strip()]
    if nameless:
        more = f" and {len(nameless) - 1} more" if len(nameless) > 1 else ""
        raise UserError(
            f"{path} has no name for the class folder {nameless[0]!r}{more}; each needs a line "
            f"`{nameless[0]} its name`.",
            exit_status=1,
        )
    return names


def _pair(line: str, folders: Iterable[str]) -> list[tuple[str, str]]:
    """The folder that a line begins with, the longest if there are several, and the name after it."""
    line = unicodedata.normalize("NFC", line.replace('"', ""))
    begun = {unicodedata.normalize("NFC", folder): folder for folder in folders}
    begins = [f for f in begun if line.startswith(f) and line[len(f) : len(f) + 1] in tuple(" \t,;:")]
    if not begins:
        return []
    first = max(begins, key=len)
    return [(begun[first], line[len(first) :].strip(" \t,;:"))]


def note_on_names(classnames: Sequence[str], template: str, remedy: str) -> tuple[str, ...]:
    """A warning, with the first prompts, if class names look like numbers, ids or numbered names; else nothing."""
    odd = [
        name
        for name in classnames
        if _NUMBERED.match(name) or (re.search(r"\d", name) and not _WORD.search(name))
    ]
    if not odd:
        return ()
    prompts = ", ".join(json.dumps(template.format(name), ensure_ascii=False) for name in odd[:_SHOWN])
    more = ", ..." if len(odd) > _SHOWN else ""
    return (
        f"{len(odd)} of {len(classnames)} class names look like numbers or ids, and stand in prompts as they are: "
        f"{prompts}{more}; {remedy}.",
    )


def note_on_gaps(
    classnames: Sequence[str], train: Iterable[Sample], test: Iterable[Sample]
) -> tuple[str, ...]:
    """A warning for each split that has no image of some classes."""
    notes = []
    for samples, purpose in ((train, "to train on"), (test, "to test on")):
        seen = {sample.label for sample in samples}
        lacking = [repr(name) for label, name in enumerate(classnames) if label not in seen]
        if lacking:
            more = ", ..." if len(lacking) > _SHOWN else ""
            notes.append(
                f"{len(lacking)} of {len(classnames)} classes {'has' if len(lacking) == 1 else 'have'} no image {purpose}: "
                f"{', '.join(lacking[:_SHOWN])}{more}."
            )
    return tuple(notes)
