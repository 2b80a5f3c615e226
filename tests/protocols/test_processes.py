"""Several processes: the same results, no cell lost by another's failure or death, and an end on interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from tiny_protocols import small_experiment

from cocoop_fast.protocols.cells import Cell, make_cells
from cocoop_fast.protocols.processes import run_in_processes
from cocoop_fast.training.observer import Observer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")]


class Killer(Observer):
    """Kills its process in one cell, once: the mark left on disk is of the first time."""

    def __init__(self, cell: str, victim: str, mark: Path) -> None:
        self.active = cell == victim and not mark.exists()
        self.mark = mark

    def on_evaluation_start(self, method, subset, images):
        if self.active:
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Breaker(Observer):
    """Fails in one cell."""

    def __init__(self, cell: str, victim: str) -> None:
        self.active = cell == victim

    def on_evaluation_start(self, method, subset, images):
        if self.active:
            raise RuntimeError("broken")


def killer(victim: str, mark: Path, cell: str) -> Observer:
    return Killer(cell, victim, mark)


def breaker(victim: str, cell: str) -> Observer:
    return Breaker(cell, victim)


def sweep(experiment, observer_of, devices=("cpu",)):
    cells = make_cells(experiment)
    folder = experiment.root / "features"
    return {str(o.cell): o for o in run_in_processes(cells, devices, folder, observer_of, threads=1)}


def test_a_process_that_dies_costs_one_cell(tmp_path):
    experiment = small_experiment(tmp_path, methods=("zeroshot",), seeds=(1, 2, 3))
    observer_of = partial(killer, "digits, zeroshot, seed 2", tmp_path / "killed")
    outcomes = sweep(experiment, observer_of)
    assert [o.status for o in outcomes.values()] == ["finished", "failed", "finished"]
    lost = outcomes["digits, zeroshot, seed 2"]
    assert "its process ended unexpectedly (SIGKILL" in lost.error
    again = sweep(experiment, observer_of)
    assert [o.status for o in again.values()] == ["finished"] * 3
    assert again["digits, zeroshot, seed 2"].accuracy == outcomes["digits, zeroshot, seed 1"].accuracy


def test_two_processes_share_the_work_and_a_failure_is_one_cell_s(tmp_path):
    experiment = small_experiment(tmp_path, methods=("zeroshot",), seeds=(1, 2, 3, 4))
    outcomes = sweep(experiment, partial(breaker, "digits, zeroshot, seed 3"), devices=("cpu", "cpu"))
    assert set(outcomes) == {str(cell) for cell in make_cells(experiment)}
    assert {name for name, o in outcomes.items() if o.status == "failed"} == {"digits, zeroshot, seed 3"}
    assert outcomes["digits, zeroshot, seed 3"].error == "RuntimeError: broken"
    accuracies = {tuple(o.accuracy.items()) for o in outcomes.values() if o.status == "finished"}
    assert len(accuracies) == 1
    assert all(isinstance(o.cell, Cell) and o.cell.config.model.device == "auto" for o in outcomes.values())
    assert len(list((experiment.root / "features").glob("*.safetensors"))) == 1


def test_control_c_ends_all_processes(tmp_path):
    command = [
        *(
            sys.executable,
            "-m",
            "cocoop_fast",
            "sweep",
            "base2new",
            "--datasets",
            "digits",
            "--methods",
            "cocoop",
        ),
        *("--seeds", "1", "2", "--jobs", "2", "--shots", "2", "-o", str(tmp_path), "optim.epochs"),
    ]
    process = subprocess.Popen(
        [*command, "400"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "epoch" in line:
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    said = [line for line in err.splitlines() if not line.startswith("[")]
    assert said == ["error: interrupted; what was saved is kept, and the same command goes on from there."]
    deadline = time.monotonic() + 60
    while _group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _group_lives(process.pid)
    assert list(tmp_path.rglob("checkpoints/*.pt")) and not list(tmp_path.rglob("cocoop/*/results.json"))


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
