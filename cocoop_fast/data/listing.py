"""Directories and text files, read in an order that is the same on every machine."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from cocoop_fast.errors import UserError
from cocoop_fast.files.parsing import ParseError, json_value

# What systems put beside one's files: macOS into archives, Synology's thumbnails, Windows, ext4.
_OF_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not the user's to be read."""
    return name.startswith(".") or name in _OF_SYSTEMS


def visible_folders(folder: Path) -> list[Path]:
    """Sub-directories by name, hidden ones apart."""
    return [folder / name for name in _names(folder, directories=True)]


def visible_files(folder: Path) -> list[Path]:
    """Files by name, hidden ones apart, whatever their ending."""
    return [folder / name for name in _names(folder, directories=False)]


def refuse_undecodable(path: Path, root: Path) -> None:
    """Raises a UserError if a path is not UTF-8 text, as in archives of other systems: neither prompts nor the files of a run
    can hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The name of {path} is not UTF-8 text, perhaps from an archive that another system made; rename it, or all of them "
            f"with `convmv -r --notest -f ENCODING -t utf-8 {root}`, where ENCODING is that system's, such as gbk or cp1252.",
            exit_status=1,
        ) from error


def holds_runs(folder: Path) -> bool:
    """Whether a folder is a run's directory or has one a few folders down, as ``output/`` has."""
    return any(
        (config.parent / "log.txt").exists() or (config.parent / "results.json").exists()
        for depth in range(4)
        for config in folder.glob("*/" * depth + "config.yaml")
    )


def misplaced(root: Path, path: str) -> Path | None:
    """Where something lies that should be at ``root / path``: one folder too deep, or too high; ``None``: not there.

    Archives are often unpacked into a folder of their own name: cars_train/cars_train/00001.jpg.
    """
    parts = PurePosixPath(path).parts
    for i in range(len(parts)):
        above = root.joinpath(*parts[:i])
        if not above.is_dir():
            break
        for within in (*visible_folders(above), above):
            rest = parts[i:] if within != above else parts[i + 1 :]
            if rest and (found := within.joinpath(*rest)).exists():
                return found
    return None


def natural_order(name: str) -> list[str | int]:
    """A key to sort names by: numbers in them by their value, so that 2 comes before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without surrounding space; empty ones are left out.

    Raises:
        UserError: it cannot be read, is not text, or is empty.
    """
    # Not by str.splitlines, for which some characters end a line that may stand in a name.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path))]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} is empty.", exit_status=1)
    return lines


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return json_value(read_text(path))
    except ParseError as error:
        raise UserError(f"{path} cannot be used: {error}.", exit_status=1) from error


def _names(folder: Path, *, directories: bool) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir() == directories
            )
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.", exit_status=1) from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        UserError: it cannot be read, or is in another encoding.
    """
    try:
        content = path.read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        # Excel begins a CSV file in UTF-8 with a byte order mark as well.
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", exit_status=1) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text; save it in that encoding (spreadsheets call it CSV UTF-8).",
            exit_status=1,
        ) from error
    if "\0" in text:
        raise UserError(
            f"{path} has zero bytes, so it is not text, or in an encoding that is not read; save it as UTF-8.",
            exit_status=1,
        )
    return text
