"""A run that is killed ten times at random moments ends bit for bit as one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cocoop_fast.training.run_directory import read_run

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_ten_times(tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_repeatedly.py"), str(tmp_path), "10"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    moments = [line for line in done.stdout.splitlines() if line.startswith("killed at")]
    assert len(moments) == 10 and len(set(moments)) >= 3, f"not at different moments: {done.stdout}"
    (_, whole), (_, killed) = read_run(tmp_path / "whole"), read_run(tmp_path / "killed")
    assert killed.step == whole.step == 60
    for name, value in whole.parameters.items():
        assert torch.equal(killed.parameters[name], value), name
    for ours, theirs in zip(
        killed.optimizer["state"].values(), whole.optimizer["state"].values(), strict=True
    ):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["evaluations"] == results[1]["evaluations"]
