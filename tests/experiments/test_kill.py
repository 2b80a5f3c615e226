"""A run that is killed again and again at random moments ends bit for bit as one that is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import assert_same_ends

from cocoop_fast.runs.directory import read_run

HERE = Path(__file__).parent
STEPS_AN_EPOCH, SAVED_EVERY = 10, 2  # of kill_repeatedly.py


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize(
    ("kills", "epochs"), [(5, 4), pytest.param(100, 60, marks=[pytest.mark.slow, pytest.mark.soak])]
)
def test_killed_repeatedly(tmp_path, kills, epochs):
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_repeatedly.py"), str(tmp_path), str(kills), str(epochs)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent / "helpers"), str(HERE.parents[1])]),
        },
        capture_output=True,
        text=True,
        timeout=30 * kills,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    moments = [(int(a), int(b)) for a, b in re.findall(r"killed after (\d+) steps, saved (\d+)", done.stdout)]
    assert len(moments) == kills and len(set(moments)) >= kills // 3, (
        f"not at different moments: {done.stdout}"
    )
    steps = STEPS_AN_EPOCH * epochs
    assert moments[-1][0] < steps, "the last kills came after the run's end"
    assert all(after - saved <= SAVED_EVERY for after, saved in moments), f"steps were lost: {done.stdout}"
    (_, whole), (_, killed) = read_run(tmp_path / "whole"), read_run(tmp_path / "killed")
    assert killed.step == whole.step == steps
    assert_same_ends(tmp_path / "killed", tmp_path / "whole")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["evaluations"] == results[1]["evaluations"]
