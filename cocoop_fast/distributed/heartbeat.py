"""Threads in each rank that notice when another one is gone, and end its own.

Gloo notices by itself, in the next collective. NCCL waits, and so does whoever is busy elsewhere.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from torch.distributed import Store

from cocoop_fast.distributed.ranks import GO_ON

INTERVAL = 1.0  # seconds between two beats
# A rank that has not been heard of for so many beats of one's own is gone. Beats are counted rather than seconds, so
# that ranks which are suspended together do not take each other for dead when they wake up.
MISSED_BEATS = 12
_FAILURE = "failure"
_ROUNDS = -1  # among the ranks' numbers: of one's own talks to the store


class Heartbeat:
    """Beats until it is stopped; ends this process, with a sentence, when another rank has failed or is silent.

    One thread talks to the store, which a process that hangs may hold for minutes; the other counts.

    Args:
        store: a connection of its own, as calls of one connection wait for each other. Rank 0, or what started the
            ranks, answers it.
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        self._store = store
        self._rank = rank
        self._heard = {other: 0 for other in range(ranks) if other != rank}
        self._processes: dict[int, str] = {}
        self._rounds = 0  # of talking to the store
        self._failure: str | None = None
        self._done = threading.Event()
        self._talking = threading.Thread(target=self._talk, name="heartbeat", daemon=True)
        self._counting = threading.Thread(target=self._count, name="heartbeat-count", daemon=True)
        self._talking.start()
        self._counting.start()

    def stop(self) -> None:
        """From now on nobody is waited for, nor told anything."""
        self._done.set()
        self._counting.join()
        self._talking.join(MISSED_BEATS * INTERVAL / 4)  # the store may never answer

    def fail(self, sentence: str) -> None:
        """Stop, and tell the other ranks why."""
        self.stop()
        if self._talking.is_alive():
            return
        try:
            self._store.set(_FAILURE, f"rank {self._rank} has failed ({sentence.rstrip('.')})")
        except RuntimeError:  # the store's process has ended before us; the others see that, too
            return

    def _talk(self) -> None:
        try:
            self._store.set(f"process {self._rank}", _identity(os.getpid()))
            while not self._done.wait(INTERVAL):
                self._store.add(str(self._rank), 1)
                for other in self._heard:
                    self._heard[other] = self._store.add(str(other), 0)
                    if self._heard[other] and other not in self._processes:
                        self._processes[other] = self._store.get(f"process {other}").decode()
                if self._store.check([_FAILURE]):
                    self._failure = self._store.get(_FAILURE).decode()
                self._rounds += 1
        except RuntimeError:
            if not self._done.wait(MISSED_BEATS * INTERVAL / 4):  # at the end of a run all is well
                self._failure = "the process that the ranks meet through has ended"

    def _count(self) -> None:
        before: dict[int, int] = {}
        missed: dict[int, int] = {}
        while not self._done.wait(INTERVAL):
            counts = {**self._heard, _ROUNDS: self._rounds}
            for key, count in counts.items():
                missed[key] = missed.get(key, 0) + 1 if before.get(key) == count else 0
            before = counts
            if missed[_ROUNDS] > MISSED_BEATS:
                self._end("the process that the ranks meet through does not answer", silent=[0])
            silent = [rank for rank in self._heard if missed[rank] > MISSED_BEATS]
            if self._failure is not None:
                self._end(self._failure)
            elif silent and not missed[_ROUNDS]:
                names = ", ".join(f"rank {rank}" for rank in silent)
                have = "has" if len(silent) == 1 else "have"
                self._end(
                    f"{names} {have} not been heard of for {MISSED_BEATS * INTERVAL:.0f} seconds", silent
                )

    def _end(self, failure: str, silent: list[int] | None = None) -> None:
        """End this process, and those on this machine that hang: torchrun would wait 30 s before it kills them."""
        print(f"error: {failure}, so rank {self._rank} ends too; {GO_ON}.", file=sys.stderr, flush=True)
        for rank in silent or ():
            process = self._processes.get(rank, "")
            pid = int(process.rsplit(" ", 1)[-1]) if process else 0
            if pid and process == _identity(pid):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)  # the main thread may be in a collective that never ends


def _identity(pid: int) -> str:
    """What no other process has, ever and anywhere: boot, container, start and number. Empty where nothing tells them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {started} {pid}"
    except (OSError, IndexError):
        return ""
