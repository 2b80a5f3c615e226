"""A pass of the CPU's operations, recorded once and repeated in a few calls: what Python does between them is done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from cocoop_fast.ops.extensions import CPP

_current: ContextVar[_Recording | None] = ContextVar("recording", default=None)


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
        with recording:
            recording.begin()
            work()
    finally:
        recording.end()
        _current.reset(token)
    return recording.repeat if recording.complete else None


def keep(*arguments: object) -> None:
    """What a call of the extension is given stays as long as its recording, if there is one."""
    recording = _current.get()
    if recording is not None:
        recording.kept.append(arguments)


class _Recording(TorchDispatchMode):
    """The steps of a pass: runs of the extension's calls, and torch's operations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.complete = True
        self.kept: list[object] = []
        self._steps: list[Callable[[], object]] = []
        self._run: Any = None  # of calls, the last one

    def begin(self) -> None:
        self._run = CPP.load().Recording()
        self._run.begin()

    def end(self) -> None:
        self._run.end()
        if len(self._run):
            self._steps.append(self._run.run)

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
        elif not operation.is_view:
            self.complete = False
        return call()
