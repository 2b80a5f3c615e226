"""A run that fails before its first checkpoint leaves nothing behind.

Otherwise the next attempt, with the mistake corrected, would be told that the directory holds another run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

# What a run writes before its first checkpoint.
EARLY_FILES = ("config.yaml", "log.txt", "metrics.jsonl", ".lock")


@contextlib.contextmanager
def undo_failed_start(path: Path, methods: tuple[str, ...] = ()) -> Iterator[None]:
    """On an exception, remove the run directories that were begun inside and hold no checkpoint.

    Args:
        path: the run directory; each of ``methods`` may have one of its own below it.
        methods: the compared methods.
    """
    folders = [*(path / method for method in methods), path]
    new = [folder for folder in folders if not (folder / "config.yaml").exists()]
    made = [folder for folder in (*folders, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in new:
            if folder.is_dir() and not (folder / "checkpoints").exists():
                for name in EARLY_FILES:
                    (folder / name).unlink(missing_ok=True)
        for folder in made:  # innermost first
            # A directory that is not empty stays, and so do all above it.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
