"""`pytest benchmarks/ --benchmark-only` as a newcomer calls it: few minutes, and a table that fits a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from short_set import CONTESTANTS, WIDEST, is_whole, table

from cocoop_fast.measure.contestants import BY_NAME

ROOT = Path(__file__).parents[1]


def record(name, seconds, floor, k=100, action="step"):
    return {
        "contestant": name, "action": action, "classes": k, "batch": 1, "rows": 446, "best_seconds": seconds,
        "ratio_to_floor": seconds / floor,
    }  # fmt: skip


def test_the_table_compares_with_the_floor_and_with_dense():
    lines = table(
        [
            record("engine", 0.4, 0.5),
            record("dense", 10.0, 0.5),
            {"peak_mb": 3},
            record("engine", 1.0, 1.0, k=1000),
        ]
    )
    assert re.fullmatch(r"step, 100 classes, batch 1: engine +446 +400 ms +0\.80 +25\.0 x", lines[1])
    assert re.fullmatch(r"step, 100 classes, batch 1: dense +446 +10 s +20\.00 +1\.0 x", lines[2])
    assert lines[3].endswith(" -") and len(lines) == 4
    assert table([{"peak_mb": 3}]) == []
    widest = table([record(name, 1e4, 1e-4, k=1000, action="forward") for name in BY_NAME])
    assert max(map(len, widest)) <= WIDEST


def test_who_names_what_to_measure_gets_it(tmp_path):
    file = tmp_path / "test_x.py"
    file.touch()
    assert is_whole([str(tmp_path)], "")
    assert not is_whole([str(tmp_path)], "engine")
    assert not is_whole([str(file)], "") and not is_whole([f"{file}::test_y"], "")


def test_the_default_is_a_short_set():
    call = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--collect-only", "-q"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True, env=alone
    ).stdout
    assert re.findall(r"::(test_.*)$", found, re.MULTILINE) == [
        f"test_step[{name}-k100-b1]" for name in CONTESTANTS
    ]
    assert int(re.search(r"\((\d+) deselected\)", found)[1]) > 100
    assert set(CONTESTANTS) <= set(BY_NAME)
