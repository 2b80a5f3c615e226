"""Paths that come from a file: only those that stay below the images' directory are taken."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

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
