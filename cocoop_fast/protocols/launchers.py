"""Where cells are run: the one interface of all launchers, and those that hand cells to SLURM and to Ray.

Every cell is an ordinary run in its own directory, so that no launcher keeps a state of its own: what is finished is read, what
is half-trained goes on, whichever launcher runs it next. Workers must see the same file system.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from cocoop_fast.errors import UserError
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.files.atomic import write_json
from cocoop_fast.protocols.cells import Cell
from cocoop_fast.protocols.run_cell import CellWork, Outcome, is_finished, run_cells
from cocoop_fast.training.observer import Observer

_MINUTES = 240  # of a SLURM job; one whose time is over is submitted again, and goes on
_TIMES = 100  # that it is submitted again, at most
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED")  # SLURM's states


class Launcher(Protocol):
    """Runs cells somewhere, one or many at a time."""

    def __call__(
        self, cells: Sequence[Cell], work: CellWork, overwrite: frozenset[Cell] = frozenset()
    ) -> Iterator[Outcome]:
        """Run ``work`` on each cell (those in ``overwrite`` anew).

        Yields:
            Outcomes in the order in which cells end; a cell whose process dies has "failed". Closing the generator ends
            whatever it began.

        Raises:
            UserError: the launcher cannot be used here, or does not know a resource that is asked for.
        """
        ...


def read_then_launch(
    cells: Sequence[Cell],
    shared: Shared,
    launch: Launcher,
    work: CellWork,
    *,
    overwrite: frozenset[Cell] = frozenset(),
) -> Iterator[Outcome]:
    """Read finished cells here, and hand the others to a launcher."""
    finished = [cell for cell in cells if cell not in overwrite and is_finished(cell)]
    yield from run_cells(finished, shared, Observer())
    others = [cell for cell in cells if cell not in finished]
    if others:
        yield from launch(others, work, overwrite)


@dataclass(frozen=True)
class Slurm:
    """A job a cell, by submitit. What a lost terminal left running is waited for by the next call.

    Args:
        folder: of jobs' logs, which all nodes must see.
        resources: what ``submitit.AutoExecutor.update_parameters`` takes, for each job: ``timeout_min``, ``gpus_per_node``,
            ``cpus_per_task``, ``mem_gb``, ``slurm_partition``, ``slurm_account``, ``slurm_array_parallelism`` …
        cluster: submitit's name of an executor; "local" and "debug" need no SLURM.
        poll_seconds: between looks at the jobs.
    """

    folder: Path
    resources: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"
    poll_seconds: float = 5.0

    def __call__(
        self, cells: Sequence[Cell], work: CellWork, overwrite: frozenset[Cell] = frozenset()
    ) -> Iterator[Outcome]:
        submitit = _installed("submitit", "slurm")
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError("There is no sbatch here; --launcher slurm is for a node that submits to SLURM.")
        self.folder.mkdir(parents=True, exist_ok=True)
        limits = {"slurm_max_num_timeout": _TIMES} if self.cluster == "slurm" else {}
        executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, **limits)
        try:
            executor.update_parameters(**{"name": "cocoop-fast", "timeout_min": _MINUTES, **self.resources})
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"--resources: submitit says: {' '.join(str(error).split())}") from error
        jobs: dict[Cell, Any] = self._alive([cell for cell in cells if cell not in overwrite])
        waiting = [cell for cell in cells if cell not in jobs]
        if waiting:
            with executor.batch():  # one job array
                jobs |= {cell: executor.submit(work, cell, cell in overwrite) for cell in waiting}
        write_json(self._known_jobs, {str(cell.run_dir): job.job_id for cell, job in jobs.items()})
        try:
            while jobs:
                for cell in [cell for cell, job in jobs.items() if job.done()]:
                    yield _of_job(cell, jobs.pop(cell))
                if jobs:
                    time.sleep(self.poll_seconds)
        finally:
            for job in jobs.values():
                job.cancel(check=False)

    @property
    def _known_jobs(self) -> Path:
        return self.folder / "jobs.json"

    def _alive(self, cells: Sequence[Cell]) -> dict[Cell, Any]:
        """Jobs of an earlier call whose terminal was lost."""
        if self.cluster != "slurm" or not self._known_jobs.exists():
            return {}
        from submitit import SlurmJob

        known = json.loads(self._known_jobs.read_text(encoding="utf-8"))
        jobs: dict[Cell, Any] = {
            cell: SlurmJob(self.folder, known[str(cell.run_dir)])
            for cell in cells
            if str(cell.run_dir) in known
        }
        return {cell: job for cell, job in jobs.items() if str(job.state).split()[0] in _ALIVE}


def _of_job(cell: Cell, job: Any) -> Outcome:
    try:
        return job.result()
    except Exception as error:  # submitit's, of a job that left no result
        first = " ".join(str(error).split("\n", 1)[0].split())
        return Outcome(
            cell, "failed", error=f"job {job.job_id}: {first}; its log is {job.paths.stderr}", usage=False
        )


@dataclass(frozen=True)
class Ray:
    """A task a cell, on the cluster that ``RAY_ADDRESS`` names, or on a Ray of this machine alone.

    Args:
        resources: what ``ray.remote`` takes, for each task: ``num_cpus``, ``num_gpus``, ``memory``, ``max_retries`` …
    """

    resources: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, cells: Sequence[Cell], work: CellWork, overwrite: frozenset[Cell] = frozenset()
    ) -> Iterator[Outcome]:
        ray = _installed("ray", "ray")
        ours = not ray.is_initialized()
        try:
            task = ray.remote(**{"num_cpus": 1, "max_retries": 0, **self.resources})(_ray_task)
        except (TypeError, ValueError) as error:
            raise UserError(f"--resources: Ray says: {' '.join(str(error).split())}") from error
        if ours:
            alone = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="ERROR", **alone)
        running = {task.remote(work, cell, cell in overwrite): cell for cell in cells}
        try:
            while running:
                [ready], _ = ray.wait(list(running))
                cell = running.pop(ready)
                try:
                    yield ray.get(ready)
                except ray.exceptions.RayError as error:
                    first = " ".join(str(error).split("\n", 1)[0].split())
                    yield Outcome(cell, "failed", error=f"its Ray task died: {first}", usage=False)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if ours:
                ray.shutdown()


def _ray_task(work: CellWork, cell: Cell, overwrite: bool) -> Outcome:
    return work(cell, overwrite)


def _installed(package: str, extra: str) -> Any:
    """The package of a launcher.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(
            f"--launcher {extra} needs {package}, which is not installed: pip install 'cocoop-fast[{extra}]'."
        ) from error
