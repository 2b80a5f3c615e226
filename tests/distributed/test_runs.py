"""Runs on several processes end with the parameters and the accuracy of one process, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import tiny_config, use_tiny_clip

from cocoop_fast.distributed import heartbeat
from cocoop_fast.experiments import experiment
from cocoop_fast.runs.directory import read_run

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

# Fifty steps, or one more where an epoch has three.
BY_IMAGES = {
    2: {"optim__batch_size": 2, "optim__epochs": 10},
    3: {"optim__batch_size": 3, "optim__epochs": 17},
}
ONE_BY_ONE = {"optim__epochs": 5}
GRADIENTS = [
    {"prompt": {"method": "cocoop"}},
    {"prompt": {"method": "coop"}},
    {"prompt": {"method": "coop", "csc": True, "ctx_init": "", "n_ctx": 2}},
    {"prompt": {"method": "meta-nets", "class_position": "middle"}},
    {"prompt": {"method": "cocoop"}, "engine": {"prune_mass": 0.3}},
    {"prompt": {"method": "cocoop"}, "engine": {"float32_budget": 150_000, "backend": "torch"}},
]

MOST_WRONG = {"float32": 2e-5, "float64": 1e-10}


def train(output, fields, **more):
    return {"do": "train", "output": str(output), "fields": fields, **more}


def start(file, work, *launcher):
    """A process that reads its work from a file."""
    file.write_text(json.dumps(work))
    paths = os.pathsep.join([str(HERE.parent / "helpers"), str(HERE.parents[1])])
    return subprocess.Popen(
        [sys.executable, *launcher, str(HERE / "run_ranks.py"), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(file, jobs, ranks):
    return start(file, jobs, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder):
    """The same runs by this process alone, by their name."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        for name, fields in (("images2", BY_IMAGES[2]), ("images3", BY_IMAGES[3]), ("classes", ONE_BY_ONE)):
            experiment.run(tiny_config(folder / "alone" / name, **fields))
    return folder / "alone"


@pytest.fixture(scope="module")
def launched(folder):
    """Runs by two and by three ranks of torchrun; the second launch goes on with a run that the first one left."""
    answers = {}
    for ranks in (2, 3):
        own = folder / f"ranks{ranks}"
        own.mkdir()
        left = train(folder / "left", {**ONE_BY_ONE, "checkpoint_steps": 7})
        if ranks == 2:
            left["stop_after"] = 17
        jobs = [
            train(own / "images", BY_IMAGES[ranks]),
            train(own / "classes", ONE_BY_ONE),
            left,
            {"do": "evaluate", "output": str(own / "classes")},
        ]
        answers[ranks] = finish(torchrun(own / "jobs.json", jobs, ranks))
    return answers


@pytest.fixture(scope="module")
def forked(folder):
    """Launches without torchrun, by what they are for."""

    def hurt(name, signal, rank, after):
        moment = str(folder / f"{name}.moment")
        return {"signal": signal, "hurt_after": after, "rank": rank, "moment": moment, "heartbeat": 0.1}

    gradients = [{"do": "gradients", "dtype": dtype, **one} for one in GRADIENTS for dtype in MOST_WRONG]
    launches = {
        "both": {"ranks": 4, "jobs": [train(folder / "both", {**BY_IMAGES[2], "model__shard": "both"})]},
        **{f"gradients{ranks}": {"ranks": ranks, "jobs": gradients} for ranks in (2, 3)},
        "memory": {"ranks": 3, "jobs": [{"do": "short_of_memory", "times": 2}]},
        "refused": {"ranks": 3, "jobs": [train(folder / "refused", {"optim__batch_size": 4})]},
    }
    for name, *how in (
        ("SIGKILL", "SIGKILL", 1, 3),
        ("SIGSTOP", "SIGSTOP", 1, 3),
        ("first SIGSTOP", "SIGSTOP", 0, 3),
        ("SIGTERM", "SIGTERM", 1, 23),
    ):
        launches[name] = {"ranks": 2, "jobs": [train(folder / name, ONE_BY_ONE, **hurt(name, *how))]}
    return finish(start(folder / "launches.json", launches))


def assert_same_run(actual, expected):
    """What is learned to 1e-6, and every image classified alike."""
    mine, other = read_run(actual)[1], read_run(expected)[1]
    assert mine.step == other.step >= 50
    for name, value in other.parameters.items():
        assert (mine.parameters[name] - value).abs().max() <= 1e-6, name
    for one, two in zip(mine.optimizer["state"].values(), other.optimizer["state"].values(), strict=True):
        assert (one["momentum_buffer"] - two["momentum_buffer"]).abs().max() <= 1e-5
    results = [json.loads((path / "results.json").read_text())["evaluations"] for path in (actual, expected)]
    assert results[0] == results[1]


@pytest.mark.parametrize("ranks", [2, 3])
def test_images_shared_out(alone, launched, folder, ranks):
    assert_same_run(folder / f"ranks{ranks}" / "images", alone / f"images{ranks}")


@pytest.mark.parametrize("ranks", [2, 3])
def test_classes_shared_out(alone, launched, folder, ranks):
    assert_same_run(folder / f"ranks{ranks}" / "classes", alone / "classes")


def test_a_run_goes_on_with_another_number_of_ranks(alone, launched, folder):
    assert launched[2][2] == "stopped"
    assert "Resumed after step 14" in (folder / "left" / "log.txt").read_text()
    assert_same_run(folder / "left", alone / "classes")


def test_only_the_first_rank_writes(alone, launched, folder):
    for name in ("log.txt", "metrics.jsonl"):
        lines = [
            len((path / name).read_text().splitlines())
            for path in (folder / "ranks3/classes", alone / "classes")
        ]
        assert lines[0] == lines[1], name


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_shared_out(alone, launched, ranks, monkeypatch):
    use_tiny_clip(monkeypatch)
    expected = {name: vars(one) for name, one in experiment.evaluate_run(alone / "classes").items()}
    assert launched[ranks][3] == json.loads(json.dumps(expected))


def test_images_and_classes_shared_out(alone, forked, folder):
    assert forked["both"]["status"] == [0] * 4, forked["both"]["told"]
    assert_same_run(folder / "both", alone / "images2")


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_of_every_kind_of_prompt(forked, ranks):
    launch = forked[f"gradients{ranks}"]
    assert launch["status"] == [0] * ranks, launch["told"]
    errors = iter(json.loads(launch["told"].splitlines()[-1]))
    for job in GRADIENTS:
        for dtype, bound in MOST_WRONG.items():
            assert next(errors) <= bound, (job, dtype)


def test_a_rank_without_memory_lets_all_repeat_the_step_in_smaller_pieces(forked):
    assert forked["memory"]["status"] == [0] * 3, forked["memory"]["told"]
    difference, said = json.loads(forked["memory"]["told"].splitlines()[-1])[0]
    assert difference <= 1e-6
    assert len(said) == 1 and "used up at step 1. It is repeated" in said[0]


def test_what_ranks_cannot_do_is_refused_in_one_sentence(forked):
    assert forked["refused"]["status"] == [2] * 3
    assert "A batch of 4 cannot be shared evenly by 3 ranks" in forked["refused"]["told"]
    assert "Traceback" not in forked["refused"]["told"]


def test_the_death_of_a_rank_under_torchrun(alone, tmp_path, monkeypatch):
    fields = {**ONE_BY_ONE, "checkpoint_steps": 5}
    moment = tmp_path / "moment"
    hurt = {"hurt_after": 23, "rank": 1, "signal": "SIGKILL", "moment": str(moment)}
    process = torchrun(tmp_path / "jobs.json", [train(tmp_path / "run", fields, **hurt)], 2)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert time.time() - float(moment.read_text().split()[1]) < 30
    assert "ends too; run the same command again to go on from the last checkpoint." in err
    assert read_run(tmp_path / "run")[1].step == 20
    use_tiny_clip(monkeypatch)
    experiment.run(tiny_config(tmp_path / "run", **fields))
    assert_same_run(tmp_path / "run", alone / "classes")


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_ranks_without_a_launcher_end_together(forked, folder, signal):
    """The other rank waits in a collective, which notices a connection that is closed, but not a silent one."""
    launch = forked[signal]
    assert launch["status"] == [1, -9]
    assert launch["ended"] - float((folder / f"{signal}.moment").read_text().split()[1]) < 30
    assert "ends too; run the same command again to go on from the last checkpoint." in launch["told"]
    assert "Traceback" not in launch["told"]
    if signal == "SIGSTOP":
        assert "rank 1 has not been heard of" in launch["told"]


def test_a_first_rank_that_hangs_ends_the_others(forked, folder):
    """It answers no questions about the ranks either."""
    launch = forked["first SIGSTOP"]
    assert launch["status"] == [-9, 1]
    assert launch["ended"] - float((folder / "first SIGSTOP.moment").read_text().split()[1]) < 30
    assert "the process that the ranks meet through does not answer, so rank 1 ends too" in launch["told"]


def test_a_rank_that_hangs_under_torchrun_is_ended(alone, tmp_path):
    """torchrun by itself waits 30 s for a process that does not hear its SIGTERM."""
    hurt = {
        "hurt_after": 3,
        "rank": 1,
        "signal": "SIGSTOP",
        "moment": str(tmp_path / "moment"),
        "heartbeat": 0.1,
    }
    process = torchrun(tmp_path / "jobs.json", [train(tmp_path / "run", ONE_BY_ONE, **hurt)], 2)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert time.time() - float((tmp_path / "moment").read_text().split()[1]) < 25
    assert "rank 1 has not been heard of for 1 seconds, so rank 0 ends too" in err


def test_a_process_is_told_from_another_of_its_number():
    mine = heartbeat._identity(os.getpid())
    assert mine and mine == heartbeat._identity(os.getpid()) != heartbeat._identity(os.getppid())
    assert heartbeat._identity(2**22 + 1) == ""


def test_silence_is_noticed_in_time():
    assert heartbeat.INTERVAL * (heartbeat.MISSED_BEATS + 2) < 30


def test_a_signal_to_one_rank_stops_all_after_the_same_step(forked, folder):
    assert forked["SIGTERM"]["status"] == [0, 0] and forked["SIGTERM"]["told"] == ""
    assert read_run(folder / "SIGTERM")[1].step == 23
