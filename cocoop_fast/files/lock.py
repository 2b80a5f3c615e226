"""Locks between processes, and between threads of one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cocoop_fast.files.atomic import refuse_link

try:
    import fcntl
except ImportError:  # Windows, where a file that is locked cannot be removed
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()  # descriptors of locked folders


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


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder itself: unlike a lock file in it, nobody removes it and leaves the folder.

    As :func:`locked` otherwise; some network file systems lock files alone.

    Raises:
        filelock.Timeout: somebody else holds it.
        OSError: the folder is not there.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Timeout(str(folder)) from error
        except OSError:  # no locks here
            pass
        yield
    finally:
        if descriptor in _held:  # not in a forked child
            _held.remove(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    """A forked child shares its parent's locks, and would keep them longer than a parent that is killed."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)
