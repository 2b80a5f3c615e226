"""Run cells in several processes, one a device (or more): each takes the next cell when it is done with one.

A cell that fails, and a process that dies, costs that cell alone. An interruption ends all processes at once:
whatever a cell has written is whole, because every file is written atomically, and the next call goes on from
its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from cocoop_fast.evaluation.feature_cache import FeatureCache
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.protocols.cells import Cell, on_device
from cocoop_fast.protocols.run_cell import Outcome, run_cell
from cocoop_fast.training.observer import Observer

_PATIENCE = 10.0  # seconds for a process to end once it is told to

ObserverOf = Callable[[str], Observer]  # from a cell's name; must be picklable


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    device: str
    cell: Cell | None = None


def run_in_processes(
    cells: Sequence[Cell],
    devices: Sequence[str],
    features: Path,
    observer_of: ObserverOf,
    *,
    threads: int | None = None,
    overwrite: frozenset[Cell] = frozenset(),
) -> Iterator[Outcome]:
    """Run cells on several devices at once.

    Args:
        cells: in the order in which they are begun.
        devices: one process each; a device named twice gets two.
        features: folder of the feature cache that the processes share.
        observer_of: makes the observer of a cell, in its process.
        threads: of torch and the CPU engine, in each process; ``None``: their own choice.
        overwrite: cells to train anew.

    Yields:
        Outcomes in the order in which cells end. Closing the generator ends the processes.
    """
    waiting, idle = list(reversed(cells)), list(reversed(devices))
    workers: list[_Worker] = []

    def hand_out(worker: _Worker) -> None:
        worker.cell = waiting.pop()
        # A process that has just died does not take it; that is noticed when it is waited for.
        with contextlib.suppress(OSError):
            worker.connection.send((worker.cell, worker.cell in overwrite))

    try:
        while waiting or workers:
            while idle and waiting:
                workers.append(_start(idle.pop(), features, observer_of, threads))
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


def _start(device: str, features: Path, observer_of: ObserverOf, threads: int | None) -> _Worker:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, device, features, observer_of, threads))
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
    return replace(outcome, cell=worker.cell)


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


def _work(
    connection: Connection, device: str, features: Path, observer_of: ObserverOf, threads: int | None
) -> None:
    """What a process does: cells as they come, until the pipe is closed."""
    if threads is not None:
        torch.set_num_threads(threads)
    shared = Shared(FeatureCache(features))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has gone
        while True:
            cell, overwrite = connection.recv()
            outcome = run_cell(on_device(cell, device), shared, observer_of(str(cell)), overwrite=overwrite)
            connection.send(outcome)
