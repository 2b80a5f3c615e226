"""The machine and the software that a figure was measured with."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

from cocoop_fast.files.provenance import commit, package_version
from cocoop_fast.ops.extensions import CPP


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
        "cocoop_fast": package_version(),
        "commit": commit(),
    }


def one_line(machine: dict[str, str | int | None]) -> str:
    """For below a table or a plot."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}, {machine['threads']} threads, "
        f"torch {machine['torch']}"
    )


class OtherPrograms:
    """How much of the processors other programs used since this was made, where the system tells."""

    def __init__(self) -> None:
        self._wall, self._own, self._busy = time.monotonic(), time.process_time(), _busy_seconds()

    def share(self) -> float | None:
        """0: the machine was ours. 1: all cores were busy with something else."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        own = time.process_time() - self._own
        available = (time.monotonic() - self._wall) * (os.cpu_count() or 1)
        return max(0.0, (busy - self._busy - own) / max(available, 1e-9))


def _busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the system started, or were taken by other systems."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


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
    return str(CPP.load().available_isas()[-1]) if (CPP.why_unavailable() is None) else "no extension"


def _memory_gb() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, ValueError, AttributeError):
        return None
