"""Memory that the fast towers use again and again: named buffers, lent to one pass at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Statistics = tuple[Tensor, Tensor]  # float32 mean and reciprocal standard deviation of each row


class Buffers:
    """Named buffers that grow when they must, and are otherwise the same memory again and again.

    Args:
        dtype, device: of all of them.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._storage: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """A contiguous view of the named buffer; its content is whatever was there."""
        size = 1
        for extent in shape:
            size *= extent
        storage = self._storage.get(name)
        if storage is None or storage.numel() < size:
            storage = torch.empty(size, dtype=self.dtype, device=self.device)
            self._storage[name] = storage
        return storage[:size].view(shape)

    def release(self) -> None:
        """Give the memory back."""
        self._storage.clear()


Memory = TypeVar("Memory")


class Pool(Generic[Memory]):
    """Memory of passes that are done with, for the next pass.

    While a CUDA graph is recorded, every pass gets new memory, which never comes here: the graph writes into it
    whenever it is replayed, so that nobody else may have it.

    Args:
        make: more memory.
    """

    def __init__(self, make: Callable[[], Memory]) -> None:
        self._make = make
        self.free: list[Memory] = []

    def borrow(self) -> Lease[Memory]:
        """Memory that nobody else has until the lease is gone."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return Lease(self._make(), None)
        return Lease(self.free.pop() if self.free else self._make(), self)


class Lease(Generic[Memory]):
    """Memory that goes back to its pool when the last reference to the lease does."""

    def __init__(self, memory: Memory, pool: Pool[Memory] | None) -> None:
        self.memory, self._pool = memory, pool

    def owner(self) -> Tensor:
        """An empty tensor that holds the lease: autograd drops saved tensors as soon as a graph is done with."""
        owner = torch.empty(0)
        owner.lease = self  # type: ignore[attr-defined]
        return owner

    def __del__(self) -> None:
        if self._pool is not None:
            self._pool.free.append(self.memory)
