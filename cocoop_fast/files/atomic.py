"""Write a file so that it is there whole or not at all, even after a crash or a power failure.

Nothing is written through a symbolic link: who may write into a folder could else direct us to any file of ours.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, many_writers: bool = False) -> None:
    """Call ``write`` on a temporary file beside ``path`` and rename it once it is on disk.

    The old file, if any, stays until then; a link is replaced, not followed. What a failed attempt wrote is deleted, since the disk may be full; what a
    killed one wrote is deleted by the next, because the temporary name is fixed. A run directory has one writer at
    a time.

    Args:
        many_writers: processes or threads may write this file at the same time, as beside images that several runs share;
            each then has a temporary file of its own.
    """
    writer = f".{os.getpid()}.{threading.get_ident()}" if many_writers else ""
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # x: made here, so it is no link
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the file that somebody asked for
        raise
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_json(path: Path, values: Any, *, many_writers: bool = False) -> None:
    """Atomically write indented JSON."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), many_writers=many_writers)


def through_no_link(path: str, flags: int) -> int:
    """An ``opener`` for :func:`open` that refuses a path whose last part is a symbolic link, with an ``OSError``."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def make_folder(path: Path) -> None:
    """Make a folder in one that is there, if need be.

    Raises:
        OSError: the path is a symbolic link or another file, or the folder above it is gone.
    """
    refuse_link(path)
    path.mkdir(exist_ok=True)


def refuse_link(path: Path) -> None:
    """Raise the system's ``OSError`` for a symbolic link that should not be followed."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def sync_directory(folder: Path) -> None:
    """Make a rename in ``folder`` durable (a directory cannot be opened for that on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
