"""How long the host takes for the launches of the GPU engine, without a GPU and without the launches themselves.

    python tools/measure_host_time.py

Triton's launch and torch's products are replaced by nothing; the rest is as on a GPU: a tower of 12 layers, eager. It prints
milliseconds of processor time, the best of many passes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

import torch
from tiny_encoders import M, tree_of
from tiny_models import tiny_clip
from triton.runtime.jit import JITFunction

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.engine.constants import compute_constants
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.fused_tower import FusedTower
from cocoop_fast.ops import triton

WIDTH, PASSES = 64, 200


def best(work: Callable[[], object]) -> float:
    """Milliseconds of this thread's processor time."""
    seconds = []
    for _ in range(PASSES):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return 1e3 * min(seconds)


def main() -> None:
    clip = tiny_clip(width=WIDTH, heads=1, layers=12, vocab_size=1000, embed_dim=WIDTH)
    constants = compute_constants(FrozenCLIP(clip).text_weights(), tree_of([[1, 2], [1, 3], [2]]))
    tower = FusedTower(constants, triton)
    contexts = ContextRows(*(torch.zeros(rows, WIDTH, requires_grad=True) for rows in (M, 1)))
    JITFunction.run = lambda *arguments, **options: None
    torch.mm = torch.addmm = lambda *arguments, out: out

    def step() -> None:
        features = tower.encode(contexts)
        features.backward(torch.ones_like(features))

    with torch.no_grad():
        print(f"forward: {best(lambda: tower.encode(contexts)):.2f} ms")
    # The backward of autograd's runs in this thread on a CPU.
    print(f"forward and backward: {best(step):.2f} ms")


if __name__ == "__main__":
    main()
