"""Several processes: the same results, no cell lost by another's failure or death, and an end on interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_protocols import Accident, folders, run_all, small_experiment

from cocoop_fast.protocols.cells import make_cells
from cocoop_fast.protocols.processes import Processes
from cocoop_fast.protocols.run_cell import CellWork

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")]


def test_a_failure_or_a_dead_process_costs_one_cell(tmp_path):
    data = folders(tmp_path, "photos")
    experiment = small_experiment(tmp_path, data=data, methods=("zeroshot",), seeds=(1, 2, 3, 4))
    cells, features = make_cells(experiment), experiment.root / "features"
    launch = Processes(["cpu", "cpu"], threads=1)
    outcomes = list(launch(cells, CellWork(features, observer=Accident())))
    assert {o.cell for o in outcomes} == set(cells) and len(outcomes) == 4
    one, two, three, four = sorted(outcomes, key=lambda outcome: outcome.cell.seed)
    assert [o.status for o in (one, two, three, four)] == ["finished", "failed", "failed", "finished"]
    assert "its process ended unexpectedly (SIGKILL" in two.error and three.error == "RuntimeError: broken"
    assert any(text.startswith("warning: The demo CLIP knows digits") for text in (*one.said, *four.said))
    assert any(text.startswith("Classes trained on: 2 of 4") for text in one.said)
    assert one.accuracy == four.accuracy and len(list(features.glob("*.safetensors"))) == 1
    # Another process, without accidents, does what is left.
    assert [o.accuracy for o in run_all(experiment)] == [one.accuracy] * 4


def test_control_c_ends_all_processes(tmp_path):
    options = [
        "sweep",
        "base2new",
        "--datasets",
        "digits",
        "--methods",
        "cocoop",
        "--seeds",
        "1",
        "2",
        "--jobs",
        "2",
        "-o",
    ]
    command = [sys.executable, "-m", "cocoop_fast", *options, str(tmp_path)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
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
    assert said == [
        "error: interrupted; of a run what was saved is kept, and the same command goes on from there."
    ]
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
