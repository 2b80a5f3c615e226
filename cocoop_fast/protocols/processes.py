"""The local launcher: several processes, one a device (or more); each takes the next cell when it is done with one.

A pool of the standard library ends as a whole when one of its processes dies, and knows nothing of devices. Here a
cell that fails, and a process that dies, costs that cell alone. An interruption ends all processes at once: whatever a
cell has written is whole, because every file is written atomically, and the next call goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from cocoop_fast.protocols.cells import Cell
from cocoop_fast.protocols.run_cell import CellWork, Outcome

_PATIENCE = 10.0  # seconds for a process to end once it is told to


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    device: str
    cell: Cell | None = None


@dataclass(frozen=True)
class Processes:
    """Runs cells on several devices of this machine at once (a :class:`~cocoop_fast.protocols.launchers.Launcher`).

    Args:
        devices: one process each; a device named twice gets two.
        threads: of torch and the CPU engine, in each process; ``None``: their own choice.
    """

    devices: Sequence[str]
    threads: int | None = None

    def __call__(
        self, cells: Sequence[Cell], work: CellWork, overwrite: frozenset[Cell] = frozenset()
    ) -> Iterator[Outcome]:
        """Outcomes in the order in which cells end. Closing the generator ends the processes."""
        waiting, idle = list(reversed(cells)), list(reversed(self.devices))
        workers: list[_Worker] = []

        def hand_out(worker: _Worker) -> None:
            worker.cell = waiting.pop()
            # A process that has just died does not take it; that is noticed when it is waited for.
            with contextlib.suppress(OSError):
                worker.connection.send((worker.cell, worker.cell in overwrite))

        try:
            while waiting or workers:
                while idle and waiting:
                    device = idle.pop()
                    workers.append(_start(replace(work, device=device), device, self.threads))
                    hand_out(workers[-1])
                ready = wait([worker.connection for worker in workers])  # for results, or ends of processes
                for worker in [worker for worker in workers if worker.connection in ready]:
                    outcome = _outcome(worker)
                    yield outcome
                    # After an accident (no memory left, a broken GPU context) the process may be no good any more.
                    if not waiting or (outcome.status == "failed" and not outcome.usage):
                        workers.remove(worker)
                        idle.append(worker.device)
                        _stop([worker])
                    else:
                        hand_out(worker)
        finally:
            _stop(workers)


def _start(work: CellWork, device: str, threads: int | None) -> _Worker:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, work, threads))
    # Control-C reaches every process of a terminal: the children ignore it, as they inherit, and we end them.
    in_main = threading.current_thread() is threading.main_thread()  # which alone may change it
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        process.start()
    finally:
        if in_main:
            signal.signal(signal.SIGINT, previous)
    theirs.close()
    return _Worker(process, ours, device)


def _outcome(worker: _Worker) -> Outcome:
    """What became of the cell of a worker that is ready."""
    assert worker.cell is not None  # only workers with a cell are waited for
    try:
        outcome: Outcome = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(_PATIENCE)
        error = f"its process ended unexpectedly ({_exit(worker.process.exitcode)})"
        return Outcome(worker.cell, "failed", error=error, usage=False)
    return outcome


def _exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name}, perhaps for lack of memory" if name == "SIGKILL" else name


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(connection: Connection, work: CellWork, threads: int | None) -> None:
    """What a process does: cells as they come, until the pipe is closed."""
    if threads is not None:
        torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has gone
        while True:
            connection.send(work(*connection.recv()))
