"""Memory of passes over a class tree: buffers that are used again and again, lent to one pass at a time; what is free."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cocoop_fast.errors import UserError

Statistics = tuple[Tensor, Tensor]  # float32 mean and reciprocal standard deviation of each row

# Memory of so many passes is kept for later ones; one graph at a time is the rule. What more graphs used is let go.
_MOST_KEPT = 2


# Of a buffer. Panels, batch sizes and parts of a tree make some dozens.
_MOST_VIEWS = 256


class Buffers:
    """Named buffers that grow when they must, and are otherwise the same memory again and again.

    Args:
        dtype, device: of all of them.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._storage: dict[str, Tensor] = {}
        self._views: dict[str, dict[tuple[int, ...], Tensor]] = {}  # made once: a pass asks for a hundred

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in self._storage.values())

    def get(self, name: str, *shape: int) -> Tensor:
        """A contiguous view of the named buffer; its content is whatever was there."""
        views = self._views.get(name)
        if views is not None and shape in views:
            return views[shape]
        size = prod(shape)
        storage = self._storage.get(name)
        if storage is None or storage.numel() < size:
            storage = torch.empty(size, dtype=self.dtype, device=self.device)
            self._storage[name] = storage
            views = None  # of the memory before
        if views is None or len(views) == _MOST_VIEWS:
            views = self._views[name] = {}
        views[shape] = storage[:size].view(shape)
        return views[shape]


class PassMemory:
    """The memory of one pass through a tower.

    Args:
        dtype, device: of the rows.
        layers: of the tower.
        keeps: every layer keeps its activations for a backward. Otherwise all use the same buffers in turn.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, layers: int, *, keeps: bool) -> None:
        self.keeps = keeps
        self.scratch = Buffers(dtype, device)
        self.floats = Buffers(torch.float32, device)
        self.layers = [Buffers(dtype, device) if keeps else self.scratch for _ in range(layers)]
        # What a tower has last made of it. The tower keeps that: with a part's tower go the part's constants.
        self.layout: Callable[[], object] = lambda: None

    @property
    def nbytes(self) -> int:
        saved = sum(layer.nbytes for layer in self.layers) if self.keeps else 0
        return self.scratch.nbytes + self.floats.nbytes + saved

    def statistics(self, name: str, rows: int) -> Statistics:
        """Mean and reciprocal standard deviation of so many rows; both aligned to 16 bytes, or Triton's kernels would be
        compiled again for a number of rows that does not do so."""
        mean, rstd = self.floats.get(f"statistics of {name}", 2, (rows + 3) // 4 * 4)[:, :rows].unbind()
        return mean, rstd


class PassSize(NamedTuple):
    """The bytes that a pass allocates."""

    pooled: int  # wait for the next pass when this one is over
    passing: int  # are free again then, or its result
    constants: int  # of the tree; they stay with its tower

    @property
    def total(self) -> int:
        return sum(self)

    @classmethod
    def most(cls, sizes: Sequence[PassSize]) -> PassSize:
        """Of each part the most."""
        return cls(*(max(column) for column in zip(*sizes, strict=True)))


_keeper: ContextVar[_Keeper | None] = ContextVar("keeper", default=None)


@contextmanager
def lent_for_good() -> Iterator[list[PassMemory]]:
    """What passes of this thread borrow meanwhile is in the list, and nobody else gets it: for a CUDA graph, which writes into
    it whenever it is replayed, and has to hold it. Passes that come one after the other have the same memory, as ever."""
    keeper = _Keeper()
    token = _keeper.set(keeper)
    try:
        yield keeper.memory
    finally:
        _keeper.reset(token)


class _Keeper:
    """Memory that is taken from pools and not given back to them."""

    def __init__(self) -> None:
        self.memory: list[PassMemory] = []
        self._pools: dict[Pool, Pool] = {}  # of what is taken from each

    def borrow(self, pool: Pool) -> Lease:
        if pool not in self._pools:
            self._pools[pool] = Pool(partial(self._take, pool))
        return self._pools[pool].lend()

    def _take(self, pool: Pool) -> PassMemory:
        self.memory.append(pool.take())
        return self.memory[-1]


class Pool:
    """Memory of passes that are done with, for the next pass.

    While a CUDA graph is recorded, what a pass gets never comes back here: see :func:`lent_for_good`. If whoever records does
    not say so, it is new memory of the graph's own.

    Args:
        make: more memory.
    """

    def __init__(self, make: Callable[[], PassMemory]) -> None:
        self._make = make
        self._free: list[PassMemory] = []

    def borrow(self) -> Lease:
        """Memory that nobody else has until the lease is given back."""
        keeper = _keeper.get()
        if keeper is not None:
            return keeper.borrow(self)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return Lease(self._make(), None)
        return self.lend()

    def lend(self) -> Lease:
        return Lease(self.take(), self)

    def take(self) -> PassMemory:
        """Memory of a pass that is over, or more; nobody else has it."""
        try:
            return self._free.pop()
        except IndexError:
            return self._make()

    @property
    def nbytes(self) -> int:
        """What waits for the next pass."""
        return sum(memory.nbytes for memory in self._free)

    def take_back(self, memory: PassMemory) -> None:
        if len(self._free) < _MOST_KEPT:
            self._free.append(memory)

    def release(self) -> None:
        """Let go of the memory of passes that are over."""
        self._free.clear()


class Lease:
    """Memory that goes back to its pool when it is given back, or when the last reference to the lease goes.

    A pass that keeps its activations leaves the lease with its node of autograd's graph. Autograd drops the tensors that
    a node saved as soon as it needs them no more, while the node itself may live on with the result: the end of a saved
    :meth:`owner` gives the memory back. A saved-tensor hook, though, keeps something else in its place. Then the owner
    is gone before the graph is there, and the memory stays with the node.
    """

    def __init__(self, memory: PassMemory, pool: Pool | None) -> None:
        self.memory, self._pool = memory, pool
        self._held: weakref.ref[_Held] | None = None

    def owner(self) -> Tensor:
        """An empty tensor for the node to save."""
        owner, held = torch.empty(0), _Held()
        owner.held = held  # type: ignore[attr-defined]
        self._held = weakref.ref(held)
        return owner

    def follow_owner(self) -> None:
        """The graph is there: from now on the owner's end is that of its need."""
        held = None if self._held is None else self._held()
        if held is not None:
            weakref.finalize(held, self.give_back).atexit = False

    def give_back(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.take_back(self.memory)

    def __del__(self) -> None:
        self.give_back()


class _Held:
    """Something whose end can be noticed."""


class PeakBytes(TorchDispatchMode):
    """Counts the tensors that operations make while it is on: `bytes` is the most that were there at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # a view of what was there before is nothing new
                self._note(tensor.untyped_storage(), 0)
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return made

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


T = TypeVar("T")


def undisturbed(work: Callable[[], T]) -> T:
    """Do something where nothing of the caller's applies: autocast, saved-tensor hooks, modes. They are a thread's own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes that can still be had on a device, where it tells; default: the CPU.

    A GPU's are the driver's, and what torch's allocator holds without using it. A CPU's are what the host has free or what the limits of the process's control groups leave, whichever is less, shared
    out among the processes of a run on this host (`LOCAL_WORLD_SIZE`, which launchers set).
    """
    if device is not None and device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    known = [one for one in (_free_on_host(), *control_group_rooms()) if one is not None]
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(known) // (int(ranks) if ranks.isdecimal() and int(ranks) else 1) if known else None


def _free_on_host() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def control_group_rooms(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes that each limit on the process leaves: those of its control group and of all above it, version 1 or 2.

    Args:
        groups: where the kernel lists the process's groups, a line `number:controllers:path` each.
        mount: where they are mounted.
    """
    rooms = []
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            version_1 = "memory" in controllers.split(",")
            if controllers and not version_1:
                continue
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                if version_1
                else ("memory.max", "memory.current", "inactive_file")
            )
            # In a container the path may be the host's, whose groups are not mounted: then its root is the group's own.
            own = Path(path.lstrip("/"))
            roots = [mount / "memory", mount] if version_1 else [mount, mount / "unified"]
            rooms += [
                room
                for root in roots
                for group in (own, *own.parents)
                if (room := _room(root / group, *names)) is not None
            ]
    return rooms


def _room(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What a control group's limit leaves; cached files that the kernel drops on demand are not in the way."""
    try:
        most, used = ((group / name).read_text().strip() for name in (limit, usage))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdecimal():  # "max": no limit
        return None
    return max(0, int(most) - int(used) + int(statistics.get(reclaimable, 0)))


def peak_of_process(device: torch.device | str) -> int | None:
    """Bytes at the peak of this process so far: tensors on a GPU, resident memory otherwise; ``None`` if not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def parse_bytes(budget: int | str) -> int:
    """ "256MB", "1.5 GiB" or a number of bytes.

    Raises:
        UserError: neither.
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", str(budget), flags=re.IGNORECASE)
    size = 0.0
    if found is not None:
        size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    if size < 1:
        raise UserError(
            f"The memory budget '{budget}' is not an amount of memory; give bytes, or say 256MB or 1.5GiB."
        )
    return int(size)
