"""Numbers that a device computes, read some steps later so that the host never waits for the newest."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
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
        self._pending: deque[_Pending[About]] = deque()

    def push(self, values: Tensor, about: About) -> None:
        """Send a tensor on its way. It may be overwritten afterwards, in stream order.

        Args:
            values: (n,) floats on any device.
            about: given back with the values.
        """
        on_gpu = values.device.type == "cuda"
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        host.copy_(values, non_blocking=True)
        arrived = None
        if on_gpu:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(values.device))
        self._pending.append(_Pending(about, host, arrived))

    def due(self) -> list[tuple[About, list[float]]]:
        """Those that the lag makes readable, oldest first; each is returned once."""
        return self._take(self.lag)

    def rest(self) -> list[tuple[About, list[float]]]:
        """All that are still under way, oldest first. Waits for the device."""
        return self._take(0)

    def _take(self, keep: int) -> list[tuple[About, list[float]]]:
        taken = []
        while len(self._pending) > keep:
            one = self._pending.popleft()
            if one.arrived is not None:
                one.arrived.synchronize()
            taken.append((one.about, one.host.tolist()))
        return taken


@dataclass(frozen=True)
class _Pending(Generic[About]):
    about: About
    host: Tensor
    arrived: torch.cuda.Event | None
