"""A thread in each rank that notices when another one is gone, and ends its own.

Gloo notices by itself, in the next collective. NCCL waits, and so does whoever is busy elsewhere.
"""

from __future__ import annotations

import os
import sys
import threading

from torch.distributed import Store

from cocoop_fast.distributed.ranks import GO_ON

INTERVAL = 1.0  # seconds between two beats
# A rank that has not been heard of for so many beats of one's own is gone. Beats are counted rather than seconds, so
# that ranks which are suspended together do not take each other for dead when they wake up.
MISSED_BEATS = 20
_FAILURE = "failure"


class Heartbeat:
    """Beats until it is stopped; ends this process, with a sentence, when another rank has failed or is silent.

    Args:
        store: a connection of its own, as calls of one connection wait for each other.
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(ranks) if other != rank]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on nobody is waited for, nor told anything."""
        self._done.set()
        self._thread.join()

    def fail(self, sentence: str) -> None:
        """Stop, and tell the other ranks why."""
        self.stop()
        try:
            self._store.set(_FAILURE, f"rank {self._rank} has failed ({sentence.rstrip('.')})")
        except RuntimeError:  # the store's process has ended before us; the others see that, too
            return

    def _run(self) -> None:
        heard, missed = [0] * len(self._others), [0] * len(self._others)
        while not self._done.wait(INTERVAL):
            try:
                self._store.add(str(self._rank), 1)
                beats = [self._store.add(str(other), 0) for other in self._others]
                failure = self._store.get(_FAILURE).decode() if self._store.check([_FAILURE]) else None
            except RuntimeError:
                failure = "the process that the ranks meet through has ended"
                if self._done.wait(MISSED_BEATS * INTERVAL / 4):  # at the end of a run all is well
                    return
            else:
                missed = [
                    m + 1 if new == old else 0 for m, new, old in zip(missed, beats, heard, strict=True)
                ]
                heard = beats
                silent = [rank for rank, m in zip(self._others, missed, strict=True) if m > MISSED_BEATS]
                if silent and failure is None:
                    names = ", ".join(f"rank {rank}" for rank in silent)
                    have = "has" if len(silent) == 1 else "have"
                    failure = f"{names} {have} not been heard of for {MISSED_BEATS * INTERVAL:.0f} seconds"
            if failure is not None:
                print(
                    f"error: {failure}, so rank {self._rank} ends too; {GO_ON}.", file=sys.stderr, flush=True
                )
                os._exit(1)  # the main thread may be in a collective that never ends
