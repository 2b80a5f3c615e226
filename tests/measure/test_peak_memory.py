"""What a piece of work takes at its peak, measured in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cocoop_fast.measure.peak_memory import in_own_process, peak_since, settled_memory

ROOT = Path(__file__).parents[2]

ONCE = 64e6  # what any process takes once: the tokenizer's vocabulary, pages of the libraries

linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")


def allocate(floats: int) -> dict[str, int]:
    """Bytes above what was there, of a tensor that is gone and of one that is not; and how they were measured."""
    torch.ones(8 * floats)  # an earlier peak of this process
    before = settled_memory()
    torch.ones(2 * floats)
    kept = torch.ones(floats)
    return {
        "peak": peak_since(before),
        "kept": kept.nbytes,
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }


@linux_only
def test_the_peak_is_that_of_the_largest_moment_whatever_was_before():
    found = in_own_process(allocate, floats=1 << 24)
    assert 2 * found["kept"] == pytest.approx(found["peak"], rel=0.05)
    assert found["threads"] == torch.get_num_threads()
    assert found["pid"] != os.getpid()


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'bytes'"):
        in_own_process(allocate, bytes=3)


@linux_only
def test_a_model_keeps_to_its_budget(monkeypatch):
    """All of it: construction from class names, the copy of the weights, forward and backward in pieces."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from measure_limits import streamed_step

    found = in_own_process(streamed_step, classes=100, budget="200MB", rounds=1)
    assert found["rows"] == 446 and found["shards"] > 1
    assert found["peak_bytes"] < 200e6 + ONCE
