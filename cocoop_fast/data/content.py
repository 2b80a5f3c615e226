"""What image files hold, at a glance: enough to tell whether they are the same images, wherever they lie."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

_SAMPLE = 4096  # bytes that tell nearly all different files of one size apart
THREADS = 8


def size(path: Path) -> int | None:
    """Bytes of a file; ``None`` for one that is empty, not there or no file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) and found.st_size else None


def middle(path: Path) -> bytes | None:
    """A digest of the bytes in the middle of a file."""
    return _digest_of(path, _SAMPLE)


def whole(path: Path) -> bytes | None:
    """A digest of all bytes of a file."""
    return _digest_of(path, None)


def glances(paths: Iterable[Path]) -> list[str]:
    """Size and a digest of the middle of each file, as text; those of files that cannot be read are alike."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_glance, paths))


def _glance(path: Path) -> str:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return ""
    return _glance_at(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1 << 17)
def _glance_at(path: Path, length: int, changed: int) -> str:
    """Read once, however many methods are trained on the images and however often a run is looked for."""
    found = middle(path)
    return "" if found is None else f"{length} {found.hex()}"


def _digest_of(path: Path, count: int | None) -> bytes | None:
    try:
        with open(path, "rb") as file:
            if count is None:
                digest = hashlib.blake2b(digest_size=16)
                while block := file.read(1 << 20):
                    digest.update(block)
                return digest.digest()
            length = os.fstat(file.fileno()).st_size
            file.seek(max(0, (length - count) // 2))
            return hashlib.blake2b(file.read(count), digest_size=16).digest()
    except (OSError, ValueError):
        return None  # it is named when images are checked
