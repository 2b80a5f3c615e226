"""Write a file so that it is there whole or not at all, even after a crash or a power failure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, many_writers: bool = False) -> None:
    """Call ``write`` on a temporary file beside ``path`` and rename it once it is on disk.

    The old file, if any, stays until then. What a failed attempt wrote is deleted, since the disk may be full; what a
    killed one wrote is overwritten by the next, because the temporary name is fixed. A run directory has one writer at
    a time.

    Args:
        many_writers: processes may write this file at the same time, as beside images that several runs share;
            each then has a temporary file of its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if many_writers else f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_json(path: Path, values: Any, *, many_writers: bool = False) -> None:
    """Atomically write indented JSON."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), many_writers=many_writers)


def sync_directory(folder: Path) -> None:
    """Make a rename in ``folder`` durable (a directory cannot be opened for that on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
