"""Run cells in several processes, one a device (or more): each takes the next cell when it is done with one.

A cell that fails, and a process that dies, costs that cell alone. An interruption ends all processes at once:
whatever a cell has written is whole, because every file is written atomically, and the next call goes on from
its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from cocoop_fast.evaluation.feature_cache import FeatureCache
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.protocols.cells import Cell
from cocoop_fast.protocols.run_cell import Outcome, try_cell
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
    waiting = list(reversed(cells))
    workers: list[_Worker] = []
    idle = list(reversed(devices))
    try:
        while waiting or workers:
            while idle and waiting:
                workers.append(_start(idle.pop(), features, observer_of, threads))
                _hand_out(workers[-1], waiting, overwrite)
            for worker in _ready(workers):
                outcome = _outcome(worker)
                yield outcome
                # After an accident (no memory left, a broken GPU context) the process may be no good any more.
                if not waiting or (outcome.status == "failed" and not outcome.usage):
                    workers.remove(worker)
                    idle.append(worker.device)
                    _stop([worker])
                else:
                    _hand_out(worker, waiting, overwrite)
    finally:
        _stop(workers)


def _start(device: str, features: Path, observer_of: ObserverOf, threads: int | None) -> _Worker:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, device, features, observer_of, threads))
    # Control-C reaches every process of a terminal: the children ignore it, and we end them.
    with _ignored_interrupts():
        process.start()
    theirs.close()
    return _Worker(process, ours, device)


@contextlib.contextmanager
def _ignored_interrupts() -> Iterator[None]:
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which alone may change it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _hand_out(worker: _Worker, waiting: list[Cell], overwrite: frozenset[Cell]) -> None:
    cell = waiting.pop()
    worker.cell = cell
    # A process that has just died does not take it; that is noticed when it is waited for.
    with contextlib.suppress(OSError):
        worker.connection.send((cell, cell in overwrite))


def _ready(workers: list[_Worker]) -> list[_Worker]:
    """Wait for results, or ends of processes."""
    ready = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _outcome(worker: _Worker) -> Outcome:
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
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    shared = Shared(FeatureCache(features))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has gone
        while True:
            cell, overwrite = connection.recv()
            here = replace(cell, config=replace(cell.config, model=replace(cell.config.model, device=device)))
            outcome = try_cell(here, shared, observer_of(str(cell)), overwrite=overwrite)
            connection.send(outcome)
