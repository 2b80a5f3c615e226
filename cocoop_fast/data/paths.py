"""Paths that come from a file: only those that stay below the images' directory are taken."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path, PurePosixPath

from cocoop_fast.errors import UserError

_DRIVE = re.compile(r"^[A-Za-z]:")


def relative_path(text: object, where: str) -> str:
    """A path as ``Sample.source`` holds it: relative, ``/`` between parts, no ``.`` and no ``..``.

    Links are not looked at here, because nothing is opened; the reader does that.

    Args:
        text: as read; ``\\`` is a separator, since files are written on Windows too.
        where: the file and row, for the message.

    Raises:
        UserError: not a text, empty, absolute, or leading upwards.
    """
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise UserError(f"{where}: {text!r} is not a path.", exit_status=1)
    path = PurePosixPath(text.replace("\\", "/"))
    if path.is_absolute() or _DRIVE.match(text):
        raise UserError(
            f"{where}: {text!r} is an absolute path; write paths relative to the images' directory.",
            exit_status=1,
        )
    if ".." in path.parts or not path.parts:
        raise UserError(f"{where}: {text!r} does not stay below the images' directory.", exit_status=1)
    return path.as_posix()


def as_on_disk(root: Path, source: str) -> str:
    """A listed path in the Unicode form that the disk has it in: archives and disks differ in how they write an accent.

    Args:
        root: what it is relative to.
        source: as :func:`relative_path` returns it; it comes back unchanged if neither form is there.
    """
    if source.isascii() or (root / source).exists():
        return source
    forms = (unicodedata.normalize(form, source) for form in ("NFC", "NFD"))
    return next((one for one in forms if (root / one).exists()), source)
