"""How many processes read images for a device."""

from __future__ import annotations

import os

import torch

# Enough for any GPU: a view takes about 3 ms of a core, a training step at least one.
_MOST = 8


def reading_processes(wanted: int | None, device: torch.device) -> int:
    """As many as are wanted; if nothing is said, enough to feed a GPU, and none on a CPU, whose cores compute.

    A GPU gets one for each core that this process may use but the one that launches, shared among the processes of a run on
    this host (`LOCAL_WORLD_SIZE`, which launchers set), and no more than 8.
    """
    if wanted is not None:
        return wanted
    if device.type != "cuda":
        return 0
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(0, min(_MOST, _cores() // (int(ranks) if ranks.isdecimal() and int(ranks) else 1) - 1))


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
