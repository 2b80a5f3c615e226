"""The first hour on a GPU, without one: its sections run, and what happens to one leaves the others whole."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "run_gpu_report.py"

spec = importlib.util.spec_from_file_location("run_gpu_report", TOOL)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

TELLS = """
import os, sys
sys.path.insert(0, {tools!r})
from pathlib import Path
from run_gpu_report import append
records = Path(os.environ["GPU_REPORT_RECORDS"])
append(records, {{"section": {name!r}, "row": {{"K": 3, "ms": 1.5}}}})
"""
ENDINGS = {
    "well": "",
    "killed": "os.kill(os.getpid(), 9)",
    "raises": "raise RuntimeError('no such kernel')",
    "hangs": "import subprocess; subprocess.run(['sleep', '600'])",
    "torn": 'records.open(\'a\').write(\'{"section": "torn", "row\')',
}


def run_fake(records, name, limit=60.0):
    program = TELLS.format(tools=str(TOOL.parent), name=name) + ENDINGS[name]
    return tool.run_section(name, [sys.executable, "-c", program], limit, records, dict(os.environ))


def test_a_section_that_ends_badly_leaves_what_it_found_and_the_others_whole(tmp_path):
    records = tmp_path / "report.jsonl"
    records.touch()
    began = time.perf_counter()
    said = {name: run_fake(records, name, 3.0 if name == "hangs" else 60.0) for name in ENDINGS}
    assert time.perf_counter() - began < 120  # what hung is gone, and all that it started
    assert said["well"] == said["torn"] == ""
    assert said["killed"].startswith("ended with signal 9")
    assert "no such kernel" in said["raises"]
    assert said["hangs"].startswith("stopped at its limit of 3 seconds")
    for name in ENDINGS:
        page = tool.markdown(name.title(), tool.read_section(records, name))
        assert "| K | ms |\n| --- | --- |\n| 3 | 1.5 |" in page
        assert ("**This section" in page) == bool(said[name])


def test_rows_of_other_columns_are_another_table():
    rows = [{"row": {"a": 1}}, {"row": {"a": 2}}, {"row": {"b": "x|y"}}, {"note": "Said."}]
    page = tool.markdown("Title", rows)
    assert page.count("| --- |") == 2 and "x\\|y" in page and page.endswith("Said.\n\n")


def run_report(tmp_path):
    output = tmp_path / "report.md"
    command = [sys.executable, str(TOOL), "--interpret", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    page = output.read_text(encoding="utf-8")
    assert result.returncode == 0, result.stderr + page
    return page, [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_whole_report_runs_in_the_interpreter(tmp_path):
    """In one go, as the first hour on a GPU; some minutes of a slow machine."""
    page, records = run_report(tmp_path)
    endings = [one for one in records if "ending" in one]
    assert len(endings) == page.count("\n## ") >= 14 and not [one for one in endings if one["ending"]]
    assert "FlexAttention" in page and "GEMM_EFFICIENCY = " in page and "no GPU" in page


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "--interpret goes without" in result.stderr
