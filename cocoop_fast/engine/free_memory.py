"""How much memory can still be had."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def available_memory() -> int | None:
    """Bytes that can still be had, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device, where it tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()
