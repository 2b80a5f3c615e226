"""What this machine's processor can do at most: multiply-adds in registers, and reading memory. The floor below all floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from cocoop_fast.measure.timing import Timing
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP

ROUNDS = 1_000_000  # of the multiply-adds: some milliseconds
READ_BYTES = 1 << 28  # more than a cache holds


@dataclass(frozen=True)
class Peak:
    """By all threads together."""

    flops: float  # a second; a multiply-add is two
    read_bandwidth: float  # bytes a second


class PeakLoops:
    """Loops of the C++ extension, to be timed in turn with what is compared with them; none where it is not built."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[], object]] = {}
        if CPP.why_unavailable() is not None:
            return
        data = torch.zeros(READ_BYTES // 4)
        self._flops = cpu.multiply_add_loop(ROUNDS)
        self.actions = {
            "multiply-adds": lambda: cpu.multiply_add_loop(ROUNDS),
            "reading": lambda: cpu.read_loop(data),
        }

    def peak(self, timings: Mapping[str, Timing]) -> Peak | None:
        """From the times of the actions."""
        if not self.actions:
            return None
        seconds = (timings[name].best for name in ("multiply-adds", "reading"))
        return Peak(self._flops / next(seconds), READ_BYTES / next(seconds))
