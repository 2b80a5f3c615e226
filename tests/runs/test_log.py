"""log.txt against a parser that works as the reference's does, and metrics.jsonl after a crash."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cocoop_fast.evaluation.metrics import measure
from cocoop_fast.runs.log import RunLog
from cocoop_fast.training.observer import EvaluationInfo, StepInfo


def step(batch: int, batches: int = 40, **changes) -> StepInfo:
    values = {
        "step": batch, "total_steps": 80, "epoch": 1, "epochs": 2, "batch": batch, "batches": batches,
        "loss": float(batch), "accuracy": 50.0, "lr": 0.002, "seconds": 0.25, "data_seconds": 0.125,
        "images_per_second": 4.0, "eta_seconds": 3725.9,
    }  # fmt: skip
    return StepInfo(**{**values, **changes})


def result(subset: str, correct: int) -> EvaluationInfo:
    labels = np.zeros(8, dtype=np.int64)
    predictions = np.array([0] * correct + [1] * (8 - correct))
    return EvaluationInfo("cocoop", subset, measure(labels, predictions, 2), 1.0)


def parse(text: str, end_signal: str) -> dict[str, float]:
    """What the result parsers of this field take from a log: the last values after the end signal."""
    found, good = {}, False
    for line in text.splitlines():
        good |= line.strip() == end_signal
        for name in ("accuracy", "error", "macro_f1"):
            match = re.search(rf"\* {name}: ([\.\deE+-]+)%", line)
            if match and good:
                found[name] = float(match.group(1))
    return found


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_line_is_the_references(tmp_path):
    log = RunLog(tmp_path, print_freq=20, trained_on="base")
    log.on_epoch_start(1, 2, 0, 40)
    for batch in range(1, 41):
        log.on_step(step(batch))
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first == (
        "epoch [1/2] batch [20/40] time 0.250 (0.250) data 0.125 (0.125) loss 20.0000 (10.5000) "
        "acc 50.0000 (50.0000) lr 2.0000e-03 eta 1:02:05"
    )
    assert "batch [40/40]" in second and "loss 40.0000 (20.5000)" in second
    log.on_epoch_start(2, 2, 0, 40)
    log.on_step(step(20, epoch=2, loss=3.0))
    assert "loss 3.0000 (3.0000)" in (tmp_path / "log.txt").read_text()  # means start again


def test_a_short_epoch_is_logged_at_each_step(tmp_path):
    log = RunLog(tmp_path, print_freq=20, trained_on="base")
    for batch in (1, 2, 3):
        log.on_step(step(batch, batches=3))
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3
    assert [record["loss"] for record in records(tmp_path)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("end_signal", ["Finish training", "Finished training", "=> result"])
def test_result_parsers_find_the_base_accuracy(tmp_path, end_signal):
    log = RunLog(tmp_path, print_freq=1, trained_on="base")
    log.on_step(step(1))
    log.on_training_end(61.0)
    log.on_evaluation_end(result("base", 7))
    log.on_evaluation_end(result("new", 3))
    assert parse((tmp_path / "log.txt").read_text(), end_signal) == {
        "accuracy": 87.5, "error": 12.5, "macro_f1": 93.3,
    }  # fmt: skip
    assert parse((tmp_path / "test_new" / "log.txt").read_text(), "=> result")["accuracy"] == 37.5


def test_evaluation_text(tmp_path):
    log = RunLog(tmp_path, print_freq=1, trained_on="all")
    labels = np.arange(1234) % 2
    log.on_evaluation_end(EvaluationInfo("coop", "all", measure(labels, labels, 2), 1.0))
    assert (tmp_path / "log.txt").read_text() == (
        "=> result\n* total: 1,234\n* correct: 1,234\n* accuracy: 100.0%\n* error: 0.0%\n* macro_f1: 100.0%\n"
    )


def test_full_precision_for_programs(tmp_path):
    log = RunLog(tmp_path, print_freq=1, trained_on="base")
    log.on_step(step(1, loss=1 / 3))
    log.on_evaluation_end(result("new", 3))
    first, second = records(tmp_path)
    assert (first["event"], first["loss"]) == ("step", 1 / 3)
    assert (second["event"], second["subset"], second["total"], second["accuracy"]) == (
        "evaluation",
        "new",
        8,
        37.5,
    )


def test_a_line_torn_by_a_crash_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "step"}\n{"event": "st')
    RunLog(tmp_path, print_freq=1, trained_on="base").on_step(step(1))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"event": "st' and json.loads(lines[2])["loss"] == 1.0


def test_no_log_is_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "log.txt").write_text("precious")
    log = RunLog(tmp_path, print_freq=20, trained_on="base")
    (tmp_path / "log.txt").symlink_to(victim / "log.txt")
    (tmp_path / "test_new").symlink_to(victim)
    for write in (
        lambda: log.on_message("hello"),
        lambda: log.on_evaluation_end(result("new", 4)),
        lambda: RunLog(tmp_path, print_freq=20, trained_on="base"),
    ):
        with pytest.raises(OSError, match="symbolic links"):
            write()
    assert (victim / "log.txt").read_text() == "precious"


def test_names_in_a_log_do_nothing_to_a_terminal(tmp_path):
    RunLog(tmp_path, print_freq=20, trained_on="base").on_message("left out: \x1b]0;pwned\x07.jpg")
    assert (tmp_path / "log.txt").read_text() == r"left out: \u001b]0;pwned\u0007.jpg" + "\n"
