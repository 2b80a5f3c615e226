"""The machine and the software that a figure was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cocoop_fast.extension import extension_available, load_extension


def describe_machine() -> dict[str, str | int | None]:
    """Processor, threads, versions and, in a checkout, the commit."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "isa": _isa(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cocoop_fast": _version(),
        "commit": _commit(),
    }


def one_line(machine: dict[str, str | int | None]) -> str:
    """For below a table or a plot."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}, {machine['threads']} threads, "
        f"torch {machine['torch']}"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _isa() -> str:
    """The widest instruction set that the kernels use here."""
    return str(load_extension().available_isas()[-1]) if extension_available() else "no extension"


def _memory_gb() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, ValueError, AttributeError):
        return None


def _version() -> str | None:
    try:
        return version("cocoop-fast")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file lies in; "+" if it was changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "cocoop_fast", "csrc")
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
