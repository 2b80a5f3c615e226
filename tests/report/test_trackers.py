"""``train --track``: by each tracker's own way to work without a network, and without the package."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny_runs import StopAfter, tiny_config, use_tiny_clip

from cocoop_fast import UserError, cli
from cocoop_fast.experiments.experiment import run
from cocoop_fast.report import trackers as module
from cocoop_fast.report.trackers import MlflowTracker, Tracker, TrackioTracker, WandbTracker, trackers
from cocoop_fast.training.observer import Observers

CALL = [
    "train",
    "--no-compare",
    "--shots",
    "2",
    "--epochs",
    "2",
    "--batch-size",
    "5",
    "--quiet",
    "print_freq",
    "1",
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


def records_of(run_dir):
    """(step, loss) of each step, and the accuracy by subset, of the run's own log."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [(one["step"], pytest.approx(one["loss"], rel=1e-6)) for one in lines if one["event"] == "step"]
    tests = {one["subset"]: pytest.approx(one["accuracy"]) for one in lines if one["event"] == "evaluation"}
    assert len(steps) == 4 and set(tests) == {"base", "new"}
    return steps, tests


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    assert cli.run([*CALL, "-o", str(tmp_path / "run"), "--track", "mlflow"]) == 0
    steps, tests = records_of(tmp_path / "run")
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    name = (tmp_path / "run/mlflow.id").read_text().strip()
    found = client.get_run(name)
    assert found.info.status == "FINISHED" and found.data.params["optim.batch_size"] == "5"
    assert [(one.step, one.value) for one in client.get_metric_history(name, "step/loss")] == steps
    assert {subset: found.data.metrics[f"test/{subset}/accuracy"] for subset in tests} == tests


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the package wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path / "w")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert cli.run([*CALL, "-o", str(tmp_path / "run"), "--track", "wandb"]) == 0
    [file] = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    content, identity = file.read_bytes(), (tmp_path / "run/wandb.id").read_text().strip()
    assert identity in file.name
    for name in (
        b"step/loss",
        b"epoch/accuracy",
        b"test/base/accuracy",
        b"test/new/macro_f1",
        b"optim.batch_size",
    ):
        assert name in content


def test_trackio(tmp_path):
    """In a process of its own: trackio reads where it keeps things when it is imported."""
    pytest.importorskip("trackio", reason="needs the package trackio")
    code = (
        "from pathlib import Path; import trackio\n"
        "from cocoop_fast.report.trackers import TrackioTracker\n"
        "one = TrackioTracker()\n"
        "name = one.begin('a', Path('.'), {'optim.lr': 0.1}, None); one.log({'step/loss': 1.5}, 1); one.end()\n"
        "assert one.begin('a', Path('.'), {}, name) == name; one.log({'step/loss': 1.25}, 2); one.end()\n"
        "print(name)"
    )
    own = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    with sqlite3.connect(tmp_path / "cocoop_fast.db") as database:
        stored = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    losses = [(run, step, json.loads(text).get("step/loss")) for run, step, text in stored]
    name = answer.stdout.split()[-1]
    assert [one for one in losses if one[2]] == [(name, 1, 1.5), (name, 2, 1.25)]


class Remembered(Tracker):
    title, package = "Memory", "json"

    def __init__(self, fail_at=None):
        super().__init__()
        self.calls, self.fail_at = [], fail_at

    def begin(self, name, folder, config, known):
        self.calls.append(("begin", name, known))
        if self.fail_at == 0:
            raise RuntimeError("no server")
        return known or "first"

    def log(self, values, step):
        self.calls.append((step, *values))
        if step == self.fail_at:
            raise ConnectionError("the cable is out")

    def end(self):
        self.calls.append(("end",))


def test_a_run_that_goes_on_goes_on_there(tmp_path):
    config = tiny_config(tmp_path, optim__batch_size=5, checkpoint_steps=1, print_freq=2)
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=Observers(Remembered(), StopAfter(3)))
    tracker = Remembered()
    run(config, observer=tracker)
    assert tracker.calls[0] == ("begin", "digits-cocoop-seed1", "first") and tracker.calls[-1] == ("end",)
    run(config, observer=tracker, overwrite=True)
    assert [call for call in tracker.calls if call[0] == "begin"][1] == ("begin", "digits-cocoop-seed1", None)
    begun = len(tracker.calls)
    run(config, observer=tracker)  # finished: nothing is told
    assert len(tracker.calls) == begun


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path):
    tracker = Remembered(fail_at=2)
    with pytest.warns(
        UserWarning, match="Memory is told no more of this run, which goes on .the cable is out"
    ):
        results = run(tiny_config(tmp_path / "a", optim__batch_size=5, print_freq=1), observer=tracker)
    assert results.rows[0].base is not None and tracker.calls[-1][0] == 2
    with pytest.raises(
        UserError, match=r"Memory cannot begin a run .no server.; see to that, or leave --track out"
    ):
        run(tiny_config(tmp_path / "b", optim__batch_size=5), observer=Remembered(fail_at=0))


@pytest.mark.parametrize("kind", [WandbTracker, MlflowTracker, TrackioTracker])
def test_without_the_package_one_sentence(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, kind.package, None)
    with pytest.raises(
        UserError, match=f"needs the package {kind.package}, which is not installed; run `pip install"
    ):
        trackers([kind.package])


def test_unknown_trackers(tmp_path, capsys):
    assert cli.run([*CALL, "-o", str(tmp_path / "run"), "--track", "neptune"]) == 2
    assert "--track neptune is unknown; choose wandb, mlflow, trackio." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_each_is_told_once(monkeypatch):
    monkeypatch.setattr(module.importlib, "import_module", lambda name: SimpleNamespace())
    assert [type(one) for one in trackers(["mlflow", "wandb", "mlflow"])] == [MlflowTracker, WandbTracker]
