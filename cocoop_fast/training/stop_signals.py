"""SIGINT and SIGTERM end a run between two steps instead of within one."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from cocoop_fast.distributed.ranks import Ranks

_HEEDED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Notes the first SIGINT or SIGTERM; a second one does what it did before, which is to end the process at once.

    A context manager. In a thread other than the main one, which alone may handle signals, it notes nothing; and a signal
    that is ignored (SIGINT in the processes of a protocol) stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # by this process
        self.agreed: signal.Signals | None = None  # what all ranks know of
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for one in _HEEDED:
            previous = signal.getsignal(one)
            if previous in (signal.SIG_IGN, None):
                continue
            try:
                signal.signal(one, self._note)
            except ValueError:  # not the main thread
                break
            self._previous[one] = previous
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def agree(self, ranks: Ranks) -> None:
        """Heed what any rank has received by now: all end after the same step."""
        number = ranks.highest(self.received or 0)
        self.agreed = signal.Signals(number) if number else None

    def raise_received(self) -> None:
        """End as the signal asks: SIGINT as an interruption, SIGTERM with status 0. Nothing if there was none."""
        if self.agreed is signal.SIGINT:
            raise KeyboardInterrupt
        if self.agreed is signal.SIGTERM:
            raise SystemExit(0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for one, previous in self._previous.items():
            signal.signal(one, previous)
        self._previous.clear()
