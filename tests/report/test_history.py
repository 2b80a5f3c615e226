"""``metrics.jsonl`` of runs that were interrupted, and of runs that are under way."""

from __future__ import annotations

import json

from cocoop_fast.report.history import read_history


def write(path, *records):
    path.write_text(
        "".join(json.dumps(record) + "\n" if isinstance(record, dict) else record for record in records)
    )
    return path


def step(number, loss, seconds=0.5):
    return {"event": "step", "step": number, "loss": loss, "seconds": seconds, "data_seconds": 0.1}


START = {"event": "run", "epochs": 4, "first_step": 0}


def test_a_step_that_was_done_again_counts_once(tmp_path):
    again = {**START, "first_step": 1}
    history = read_history(
        write(
            tmp_path / "metrics.jsonl", START, step(1, 5.0), step(2, 4.0), again, step(2, 3.0), step(3, 2.0)
        )
    )
    assert [(one["step"], one["loss"]) for one in history.steps] == [(1, 5.0), (2, 3.0), (3, 2.0)]
    assert history.start == again


def test_torn_lines_are_passed_over(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl", START, step(1, 5.0), '{"event": "st\n', "7\n", step(2, 4.0), '{"ev'
    )
    assert len(read_history(path).steps) == 2


def test_no_file_is_a_run_that_has_not_begun(tmp_path):
    history = read_history(tmp_path / "metrics.jsonl")
    assert (history.start, history.steps, history.seconds) == ({}, (), None)
    assert history.progress() == "training has not begun" and history.step_seconds is None


def test_progress(tmp_path):
    epoch = {"event": "epoch", "epoch": 1}
    assert read_history(write(tmp_path / "a", START, epoch)).progress() == "1 of 4 epochs done"
    trained = {"event": "trained", "seconds": 7.0, "peak_memory": 9}
    history = read_history(write(tmp_path / "b", START, epoch, trained))
    assert (history.seconds, history.peak_memory) == (7.0, 9)
    assert history.progress() == "trained, but not evaluated on all of its test images"


def test_the_time_of_a_step_is_the_median_without_waiting(tmp_path):
    path = write(tmp_path / "m", START, step(1, 1.0, 9.1), step(2, 1.0, 0.3), step(3, 1.0, 0.4))
    assert abs(read_history(path).step_seconds - 0.3) < 1e-12
