"""With what, when and where a result was made."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def provenance() -> dict[str, str | None]:
    """Plain values for JSON: the date (UTC, to the second), the command as a shell would take it, the host, and the versions.

    What cannot be told is ``None``: the version of a tree that is not installed, the commit outside of a checkout.
    """
    import torch

    program, *arguments = sys.argv or ["python"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "command": shlex.join([Path(program).name, *arguments]),
        "host": platform.node() or None,
        "system": f"{platform.system()} {platform.machine()}",
        "cocoop_fast": package_version(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def package_version() -> str | None:
    """Of the installed package."""
    try:
        return version("cocoop-fast")
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit of the checkout that this file lies in; "+" if it was changed since."""
    root = Path(__file__).resolve().parents[2]  # an editable install comes by a link
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "cocoop_fast", "kernels", "csrc")
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
