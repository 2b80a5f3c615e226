"""A lock between processes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cocoop_fast.files.atomic import refuse_link


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file, which is made.

    The lock goes with the process, even a killed one, and forked children do not have it: processes that read images
    may outlive ours by seconds. On a file system without locks nothing is held.

    Args:
        path: of the lock alone, without content.
        wait: until no other process holds it.

    Raises:
        filelock.Timeout: another process holds it, and ``wait`` is off.
        OSError: the file cannot be made, or is a symbolic link.
    """
    refuse_link(path)
    lock = FileLock(path, blocking=wait)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.filename is not None or error.errno == errno.ELOOP:
            raise
    try:
        yield
    finally:
        lock.release()
