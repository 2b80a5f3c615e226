"""Event files of ``train --tensorboard``."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_runs import use_tiny_clip

from cocoop_fast import cli

CALL = ["train", "--no-compare", "--shots", "2", "--epochs", "2", "--quiet", "--tensorboard"]


def test_they_hold_what_the_log_holds(tmp_path, monkeypatch):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    use_tiny_clip(monkeypatch)
    assert cli.run([*CALL, "-o", str(tmp_path / "run"), "print_freq", "1"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()

    def curve(name):
        return [(point.step, pytest.approx(point.value, rel=1e-6)) for point in events.Scalars(name)]

    steps = [record for record in records if record["event"] == "step"]
    epochs = [record for record in records if record["event"] == "epoch"]
    assert len(steps) == 20 and len(epochs) == 2
    for field in ("loss", "accuracy", "lr", "images_per_second"):
        assert curve(f"step/{field}") == [(step["step"], step[field]) for step in steps]
    assert curve("epoch/loss") == [(10, epochs[0]["loss"]), (20, epochs[1]["loss"])]
    for record in records:
        if record["event"] == "evaluation":
            assert curve(f"test/{record['subset']}/accuracy") == [(20, record["accuracy"])]


def test_without_the_package_nothing_is_trained(tmp_path, capsys, monkeypatch):
    use_tiny_clip(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.run([*CALL, "-o", str(tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install tensorboard" in err
    assert list(tmp_path.iterdir()) == []
