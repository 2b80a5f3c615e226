"""The emulated kernels under the address and undefined-behaviour sanitizers: their tests again, in another process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_no_bad_address_and_no_undefined_behaviour():
    compiler = shutil.which("g++") or pytest.skip("no g++ to compile the kernels for the host with")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"g++ has no shared {name}")
        runtimes.append(path)
    tests = [
        "test_tree_attention.py::test_trees",
        "test_tree_attention.py::test_shapes",
        "test_assemble_prompts.py",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu"]
        + [f"tests/cuda/{test}" for test in tests],
        cwd=ROOT,
        env={
            **os.environ,
            "COCOOP_FAST_EMULATOR": "addresses",
            "LD_PRELOAD": " ".join(runtimes),
            # Python and torch never free all that they allocate.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert " passed" in result.stdout
