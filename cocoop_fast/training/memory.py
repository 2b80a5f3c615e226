"""How much memory a process has had."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: str) -> int | None:
    """Bytes at the peak of this process so far: tensors on a GPU, resident memory otherwise; ``None`` if not known.

    Args:
        device: "cpu" or a torch name of a GPU.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
