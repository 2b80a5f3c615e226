"""Cells as jobs of SLURM and tasks of Ray: the same results, a dead job costs one cell, and what is finished is only read."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from pathlib import Path

import pytest
from tiny_protocols import Accident, finished, folders, run_all, small_experiment
from tiny_runs import use_tiny_clip

from cocoop_fast import cli
from cocoop_fast.cli.cell_rows import _Rows, rows_of
from cocoop_fast.cli.launch import choose_launcher
from cocoop_fast.errors import UserError
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.protocols.cells import make_cells
from cocoop_fast.protocols.launchers import Ray, Slurm, read_then_launch
from cocoop_fast.protocols.run_cell import CellWork

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit", reason="of the extra slurm")


def one_method(tmp_path, method="zeroshot", seeds=(1, 2)):
    return small_experiment(tmp_path, data=folders(tmp_path, "photos"), methods=(method,), seeds=seeds)


def reachable_helpers(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HELPERS), *filter(None, sys.path)]))


def never(cells, work, overwrite=frozenset()):
    raise AssertionError(f"{len(cells)} cells are launched though they are finished")


@pytest.mark.parametrize(
    "seeds",
    [pytest.param((1,), marks=pytest.mark.slow), pytest.param((1, 2), marks=pytest.mark.soak)],
    ids=["one", "one-dies"],
)
def test_jobs_of_submitit_give_what_this_process_gives_and_a_dead_one_costs_its_cell(
    tmp_path, monkeypatch, submitit, seeds
):
    reachable_helpers(monkeypatch)
    experiment = one_method(tmp_path, seeds=seeds)
    launch = Slurm(experiment.root / "slurm", {"timeout_min": 5}, cluster="local", poll_seconds=0.2)
    work = CellWork(experiment.root / "features", "cpu", Accident())
    cells = make_cells(experiment)
    one, *others = sorted(launch(cells, work), key=lambda outcome: outcome.cell.seed)
    assert (one.status, one.cell) == ("finished", cells[0])
    for two in others:
        assert two.status == "failed" and two.error.startswith("job ") and "its log is" in two.error
    assert [outcome.accuracy for outcome in run_all(experiment)] == [one.accuracy] * len(seeds)


def test_what_is_finished_is_read_and_a_test_that_is_new_is_launched(tmp_path, monkeypatch, submitit):
    use_tiny_clip(monkeypatch)
    experiment = one_method(tmp_path, "cocoop")
    launch = Slurm(experiment.root / "slurm", cluster="debug", poll_seconds=0)  # runs a job in this process
    work = CellWork(experiment.root / "features")
    done = list(read_then_launch(make_cells(experiment), Shared(), launch, work))
    assert [outcome.status for outcome in done] == ["finished", "finished"]
    read = list(read_then_launch(make_cells(experiment), Shared(), never, work))
    assert [outcome.accuracy for outcome in read] == [outcome.accuracy for outcome in done]
    more = small_experiment(
        tmp_path, data=experiment.data, methods=("cocoop",), seeds=(1, 2), all_classes=True
    )
    with pytest.raises(AssertionError, match="2 cells are launched"):
        list(read_then_launch(make_cells(more), Shared(), never, work))
    again = list(read_then_launch(make_cells(more), Shared(), launch, work))
    assert all("all" in outcome.accuracy for outcome in again)


def test_a_job_whose_time_is_over_goes_on_and_does_not_begin_anew(tmp_path, submitit):
    [cell] = make_cells(one_method(tmp_path, seeds=(1,)))
    again = CellWork(tmp_path).checkpoint(cell, True)
    assert again.args == (cell,) and again.kwargs == {}


STAND_IN = {
    # Runs each task of an array, as SLURM would on other machines.
    "sbatch": """import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
open(os.path.join(os.environ["STAND_IN"], "script"), "w").write(text)
last = int((re.search(r"--array=0-(\\d+)", text) or [0, 0])[1])
for task in range(last + 1):
    env = {**os.environ, "SLURM_JOB_ID": str(70 + task), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task),
           "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
           "SLURM_JOB_NODELIST": "here"}
    log = open(os.path.join(os.environ["STAND_IN"], f"{task}.log"), "w")
    process = subprocess.Popen(["bash", sys.argv[-1]], env=env, start_new_session=True, stdout=log, stderr=log)
print("Submitted batch job 7")
""",
    "srun": """import os, sys
arguments = sys.argv[1:]
while arguments[0].startswith("-"):
    arguments = arguments[2 if arguments[0] in ("--output", "--error") else 1:]
os.execvp(arguments[0], arguments)
""",
    "sacct": "print('JobID|State|NodeList')\nfor i in range(2): print(f'7_{i}|RUNNING|here')\n",
    "scancel": "import os, sys\nopen(os.path.join(os.environ['STAND_IN'], 'cancelled'), 'a').write(sys.argv[1] + ' ')\n",
}


@pytest.mark.soak
def test_slurm_s_own_commands_and_a_lost_terminal(tmp_path, monkeypatch, capsys, submitit):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_IN.items():
        (commands / name).write_text(f"#!{sys.executable}\n{text}")
        (commands / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    reachable_helpers(monkeypatch)
    experiment = one_method(tmp_path)
    launch = Slurm(experiment.root / "slurm", {"gpus_per_node": 1}, poll_seconds=0.2)
    work = CellWork(experiment.root / "features", "cpu")
    cells = make_cells(experiment)
    # The terminal is lost at once: the generator is neither read to its end nor closed.
    lost = launch(cells, work)
    first = next(lost)
    script = (tmp_path / "script").read_text()
    assert "#SBATCH --array=0-1" in script and "#SBATCH --gpus-per-node=1" in script
    other = [cell for cell in cells if cell != first.cell]
    (commands / "sbatch").write_text(f"#!{sys.executable}\nraise SystemExit('nothing is to be submitted')\n")
    [second] = launch(other, work)
    assert (first.status, second.status) == ("finished", "finished")
    lost.close()
    assert (tmp_path / "cancelled").read_text() == "7_" + str(cells.index(second.cell)) + " "


@pytest.mark.soak
def test_tasks_of_ray_give_what_this_process_gives_and_a_dead_one_costs_its_cell(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="of the extra ray")
    reachable_helpers(monkeypatch)
    experiment = one_method(tmp_path)
    cells = make_cells(experiment)
    work = CellWork(experiment.root / "features", "cpu", Accident())
    one, two = sorted(Ray()(cells, work), key=lambda outcome: outcome.cell.seed)
    assert (one.status, two.status) == ("finished", "failed") and "its Ray task died" in two.error
    assert [outcome.accuracy for outcome in run_all(experiment)] == [one.accuracy] * 2


def test_workers_elsewhere_have_the_device_that_resources_name(tmp_path):
    """This machine need have no GPU; the precision is what it will be there, so that cells are compared with it."""
    experiment = small_experiment(tmp_path)
    launch, asked, device = choose_launcher(
        "slurm", experiment, None, 1, "gpus_per_node=2,slurm_partition=gpu"
    )
    assert device == "cuda" and asked.config.model.precision == "fp16"
    assert launch == Slurm(experiment.root / "slurm", {"gpus_per_node": 2, "slurm_partition": "gpu"})
    launch, asked, device = choose_launcher("ray", experiment, None, 1, None)
    assert (launch, asked.config.model.precision, device) == (Ray({}), "fp32", "cpu")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resources", "num_gpus=1"], "--resources is for --launcher slurm and ray"),
        (["--launcher", "slurm", "--jobs", "2"], "say what a cell needs of slurm by --resources"),
        (["--launcher", "ray", "--resources", "gpu"], "'gpu', but each is NAME=VALUE"),
        (
            ["--launcher", "kubernetes"],
            "--launcher is 'kubernetes', but it must be one of local, slurm, ray.",
        ),
        (["--launcher", "slurm"], "There is no sbatch here"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.setenv("PATH", "")
    use_tiny_clip(monkeypatch)
    if "sbatch" in sentence:
        pytest.importorskip("submitit", reason="of the extra slurm")
    assert cli.run(["run", "base2new", "-o", str(tmp_path), "--seeds", "1", "--shots", "2", *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1


def test_a_resource_that_is_unknown_and_a_package_that_is_absent(tmp_path, monkeypatch, submitit):
    cells = make_cells(one_method(tmp_path))
    with pytest.raises(UserError, match=r"--resources: submitit says: .*gpus"):
        list(Slurm(tmp_path / "slurm", {"gpus": 1}, cluster="local")(cells, CellWork(tmp_path)))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"needs ray, which is not installed: pip install 'cocoop-fast\[ray\]'"
    ):
        list(Ray()(cells, CellWork(tmp_path)))


def test_a_row_a_cell_from_what_it_writes(tmp_path):
    first, second = make_cells(one_method(tmp_path, "cocoop"))
    first.run_dir.mkdir(parents=True)
    log = first.run_dir / "metrics.jsonl"
    log.write_text('{"event": "epoch", "epoch": 9, "epochs": 10, "loss": 9, "images_per_second": 9}\n')
    out = io.StringIO()
    rows = _Rows((first, second), out)
    rows.look()
    assert out.getvalue() == ""  # an earlier call wrote that
    with log.open("a") as file:
        step = {"step": 3, "total_steps": 20, "epoch": 1, "epochs": 2, "loss": 0.5, "images_per_second": 4.0}
        for number in (3, 4):
            file.write(json.dumps({"event": "step", **step, "step": number}) + "\n")
            file.flush()
            rows.look()
        file.write('{"event": "torn')
    rows.look()
    rows.ended(finished(first, base=75.0, new=50.0))
    assert out.getvalue().splitlines() == [
        "[photos, cocoop, seed 1] epoch 1/2  loss 0.500  4.0 images/s",
        "[1/2] photos, cocoop, seed 1: base 75.00 %, new 50.00 %",
    ]


def test_rows_of_a_terminal_move_and_finished_cells_stay_as_lines(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    cells = make_cells(one_method(tmp_path, "cocoop"))
    out = Terminal()
    with rows_of(cells, stream=out) as ended:
        ended(finished(cells[0], base=75.0))
    assert "[1/2] photos, cocoop, seed 1: base 75.00 %" in out.getvalue() and "1 of 2 ended" in out.getvalue()
