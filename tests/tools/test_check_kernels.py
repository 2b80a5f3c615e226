"""tools/check_kernels.py: it says what is missing, counts loops, and notices kernels that are wrong."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/check_kernels.py"
CAN_EMULATE = shutil.which("aarch64-linux-gnu-g++") and (
    shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_kernels", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(os.uname().machine in ("aarch64", "arm64"), reason="no emulation is needed here")
def test_what_emulation_needs_is_named(tmp_path):
    result = subprocess.run(
        [sys.executable, TOOL, "--arm"], capture_output=True, text=True, env={"PATH": str(tmp_path)}
    )
    assert result.returncode == 2
    assert result.stderr == (
        "check_kernels: no aarch64-linux-gnu-g++ and qemu-aarch64 here; they are in g++-aarch64-linux-gnu and qemu-user of "
        "Debian and Ubuntu\n"
    )


def test_the_settings_are_those_of_the_build(tool):
    assert tool.build_settings("INSTRUCTION_SETS")["_neon"] == ([], "__aarch64__")
    assert "-O3" in tool.build_settings("FLAGS")


def test_the_inner_loop_is_counted(tool, tmp_path):
    """A loop around a loop: the inner one, without what stands before it."""
    listing = """
0000000000000000 <multiply>:
   0:\tldr\tq0, [sp, #16]
   4:\tfmla\tv1.4s, v0.4s, v2.s[0]
   8:\tldr\tq3, [x1], #16
   c:\tfmla\tv4.4s, v3.4s, v2.s[1]
  10:\tstr\tq4, [sp]
  14:\tcmp\tx1, x2
  18:\tb.ne\t8 <multiply+0x8>  // b.any
  1c:\tcbnz\tx3, 0 <multiply>
  20:\tret
"""
    objdump = tmp_path / "objdump"
    objdump.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}\nEND\n")
    objdump.chmod(0o755)
    loop = tool.product_loop(str(objdump), tmp_path / "kernels.o")
    assert (loop["all"], loop["fmla"], loop["stack"]) == (5, 1, 1)


# One wrong thing each: a file of csrc/cpu, what stands there, what stands there instead, and what is then said.
WRONG = {
    "tail": ("vec.h", "if (i < n) body(i, FirstLanes{n - i});", "", "WRONG"),
    "beside": ("vec.h", "body(i, FirstLanes{n - i});", "body(i, AllLanes{});", "memory"),
    "masked sum": ("vec.h", "lane_index() < (int32_t)(n - i) ? last : Vec{}", "last", "WRONG"),
    "one product less": ("linear.h", "begin + a.k_block < a.k ? begin + a.k_block : a.k;", "a.k - (a.k > 9);", "WRONG"),
    "bits by threads": ("head.h", "stretch = 1024;", "stretch = 1024; if (a.threads > 2) highest += 1.0f;", "other bits"),
    "one reader less": ("tree_attention.h", "plan.readers_end[j], 1", "plan.readers_end[j] - 1, 1", "WRONG"),
    "a constant": ("vec_math.h", "2.12194440e-4f", "2.12194440e-5f", "WRONG"),
    "a residual": ("linear.h", "z += lanes.load(row_of(a.residual, r) + i);", ";", "WRONG"),
    "NEON's last factors": ("linear.h", "for (; k < end; k++) multiply", "for (; k + 1 < end; k++) multiply", "WRONG neon"),
    "NEON's third lane": ("vec.h", "if (n == 3) v =", "if (n == 4) v =", "WRONG neon"),
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
@pytest.mark.parametrize("name", [None, *WRONG])
def test_wrong_kernels_are_noticed(tmp_path, name):
    if name is not None and name.startswith("NEON") and not CAN_EMULATE:
        pytest.skip("no cross compiler and emulator here")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    expected = None
    if name is not None:
        file, right, wrong, expected = WRONG[name]
        source = csrc / "cpu" / file
        assert source.read_text().count(right) == 1
        source.write_text(source.read_text().replace(right, wrong))
    command = [sys.executable, TOOL, "--csrc", csrc, "--calls", "20", *(["--arm"] if CAN_EMULATE else [])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == (expected is not None), result.stdout + result.stderr
    assert expected is None or expected in result.stdout, result.stdout
