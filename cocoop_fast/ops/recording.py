"""A pass of the CPU's operations, recorded once and repeated in a few calls: what Python does between them is done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from threading import RLock
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cocoop_fast.ops.extensions import CPP

# Python sees signals between runs of so many calls: a pass over 1000 classes takes seconds.
_CALLS_OF_A_RUN = 16

_current: ContextVar[_Recording | None] = ContextVar("recording", default=None)
_one_at_a_time = RLock()  # modes of torch's dispatch set flags of the whole process


def record(work: Callable[[], None]) -> Callable[[], None] | None:
    """Do `work`, and return what does the same again, to the same memory.

    Args:
        work: operations of :mod:`cocoop_fast.ops.cpu`, and torch's that write into memory that is there already. All that it
            reads and writes stays where it is: neither shapes nor addresses depend on what it computes, nor do its branches.

    Returns:
        None if an operation of torch made new memory, which the next time would be another.
    """
    recording = _Recording()
    token = _current.set(recording)
    try:
        with _one_at_a_time, recording:
            recording.begin()
            work()
    finally:
        try:
            recording.end()
        finally:
            _current.reset(token)  # and the recording ends with its last reference
    return recording.repeat if recording.complete else None


def keep(*arguments: object) -> None:
    """What a call of the extension is given stays as long as its recording, if there is one."""
    recording = _current.get()
    if recording is not None:
        recording.called(arguments)


class _Recording(TorchDispatchMode):
    """The steps of a pass: runs of the extension's calls, and torch's operations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.complete = True
        self._kept: list[object] = []
        self._steps: list[Callable[[], object]] = []
        self._run: Any = None  # of calls, the last one

    def begin(self) -> None:
        self._run = CPP.load().Recording()
        self._run.begin()

    def end(self) -> None:
        if self._run is not None:
            self._run.end()
            if len(self._run):
                self._steps.append(self._run.run)

    def called(self, arguments: object) -> None:
        self._kept.append(arguments)
        if len(self._run) == _CALLS_OF_A_RUN:
            self.end()
            self.begin()

    def repeat(self) -> None:
        for step in self._steps:
            step()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = partial(operation, *args, **(kwargs or {}))
        if operation._schema.is_mutable:
            self.end()
            self._steps.append(call)
            self.begin()
        result = call()
        there = {_storage(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = [one for one in tree_leaves(result) if one is not None]
        self.complete &= all(isinstance(one, Tensor) and _storage(one) in there for one in made)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
