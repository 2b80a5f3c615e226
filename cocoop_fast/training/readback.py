"""Numbers that a device computes, read some steps later so that the host never waits for the newest."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

About = TypeVar("About")


class Readback(Generic[About]):
    """A queue of small tensors on their way to the host.

    On a GPU a tensor is copied to pinned memory in stream order, and an event says when it has arrived. With a lag
    of n the host reads a tensor when n newer ones are under way: it is n steps ahead of the device at most, and
    waits only if the device is further behind. With a lag of 0 everything is read at once.

    Args:
        lag: tensors that may be under way.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._under_way: deque[tuple[About, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, values: Tensor, about: About) -> None:
        """Send a tensor on its way. It may be overwritten afterwards, in stream order.

        Args:
            values: (n,) floats on any device.
            about: given back with the values.
        """
        on_gpu = values.device.type == "cuda"
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.current_stream(values.device).record_event() if on_gpu else None
        self._under_way.append((about, host, arrived))

    def due(self) -> list[tuple[About, list[float]]]:
        """Those that the lag makes readable, oldest first; each is returned once."""
        return self._take(len(self._under_way) - self.lag)

    def rest(self) -> list[tuple[About, list[float]]]:
        """All that are still under way, oldest first. Waits for the device."""
        return self._take(len(self._under_way))

    def _take(self, count: int) -> list[tuple[About, list[float]]]:
        taken = []
        for _ in range(count):
            about, host, arrived = self._under_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            taken.append((about, host.tolist()))
        return taken
