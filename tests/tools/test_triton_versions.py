"""What the table of Triton versions says of what was compiled, without compiling anything."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "check_triton_versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "tools"))
    return module


def found(target="sm_90", dtype="fp16", **used):
    names = {"module": "head", "kernel": "head_fwd", "name": "wide", "registers": 32}
    zeros = {"shared_bytes": 0, "local_bytes": 0, "failure": ""}
    return names | zeros | {"target": target, "dtype": dtype} | used


def test_a_cell_says_what_is_wrong_with_how_many(tool):
    assert tool.cell([]) == ""
    assert tool.cell([found(), found()]) == "2"
    assert tool.cell([found(), found(local_bytes=8), found(failure="LLVM ERROR")]) == "3: 1 fail, 1 spill"
    assert tool.cell([found(shared_bytes=10**6)]) == "1: 1 shared"
    assert tool.cell([found("sm_120", failure=tool.UNSERVED)] * 2) == "none"
    assert tool.cell([found("sm_75"), found("sm_75", "bf16", failure="ptxas")]) == "2: 1 no bf16"


def test_all_that_lies_in_the_folder_is_read(tool, tmp_path):
    forms = [found("sm_75"), found("sm_80"), found("sm_80", "fp32")]
    (tmp_path / "triton-3.0.0-NVIDIA.json").write_text(json.dumps(forms))
    assert {key: len(own) for key, own in tool.read(tmp_path).items()} == {
        ("3.0.0", "sm_75"): 1,
        ("3.0.0", "sm_80"): 2,
    }


def test_the_page_has_every_version_and_gpu_and_the_reasons(tool):
    page = tool.page({("3.0.0", "gfx942"): [found("gfx942", failure="a | b"), found("gfx942")]})
    rows = re.findall(r"^\| ([\d.]+) \|", page, re.M)
    assert rows == list(tool.VERSIONS)
    assert (
        "| 2: 1 fail |" in page
        and "- Triton 3.0.0 for gfx942: 1 fail, such as head_fwd fp16 wide: a \\| b" in page
    )
    targets = [target for own in tool.TARGETS.values() for target in own]
    assert f"| Triton | {' | '.join(targets)} |" in page
    assert "`python tools/check_triton_versions.py`" in page
    assert "check_triton_versions.py -- --widest`" in tool.page({}, ["--widest"])


def test_the_lower_bound_is_of_a_version_in_the_table(tool):
    bound = re.search(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text())[1]
    first = next(version for version in tool.VERSIONS if tool.allowed(version))
    assert first.startswith(bound) and not tool.allowed("2.3.1")
    row = re.search(rf"^\| {first} \|(.*)\|$", (ROOT / "docs" / "triton_versions.md").read_text(), re.M)[1]
    assert all(cell.strip() for cell in row.split("|")) and "fail" not in row


def test_the_stand_in_for_a_linker_copies(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    monkeypatch.setattr(tool.Path, "glob", lambda self, pattern: iter(()))
    (tmp_path / "in").write_bytes(b"\x7fELF")
    linker = tool.linker(tmp_path)
    assert subprocess.run([linker, "--version"]).returncode == 0
    run = [linker, "-flavor", "gnu", "-shared", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    assert subprocess.run(run).returncode == 0 and (tmp_path / "out").read_bytes() == b"\x7fELF"
