"""How long the host takes for the launches of the GPU engine, without a GPU and without the launches themselves.

    python tools/measure_host_time.py

Triton's launch and torch's products are replaced by nothing; the rest is as on a GPU: a tower of 12 layers, eager. It prints
milliseconds of processor time, the best of many passes. Parts, of some classes alone, are made by every step that prunes and
for every image of an evaluation by shortlists.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

import torch
from tiny_encoders import M, tree_of
from tiny_models import IMAGE_SIZE, tiny_clip
from triton.runtime.jit import JITFunction

from cocoop_fast import ClassTree, TreeTextEncoder
from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.engine.constants import compute_constants
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.fused_tower import FusedTower
from cocoop_fast.measure.problem import imagenet_names
from cocoop_fast.methods.cocoop import PromptLearner, reference_cfg
from cocoop_fast.ops import triton

WIDTH, PASSES = 64, 200
CLASSES, OF_A_PART = 1000, (32, 100, 500)


def best(work: Callable[[], object], passes: int = PASSES) -> float:
    """Milliseconds of processor time."""
    seconds = []
    for _ in range(passes):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    clip = tiny_clip(width=WIDTH, heads=1, layers=12, vocab_size=1000, embed_dim=WIDTH)
    constants = compute_constants(FrozenCLIP(clip).text_weights(), tree_of([[1, 2], [1, 3], [2]]))
    tower = FusedTower(constants, triton)
    contexts = ContextRows(*(torch.zeros(rows, WIDTH, requires_grad=True) for rows in (M, 1)))
    JITFunction.run = lambda *arguments, **options: None
    torch.mm, torch.addmm = without_launch(torch.mm), without_launch(torch.addmm)

    def step() -> None:
        features = tower.encode(contexts)
        features.backward(torch.ones_like(features))

    with torch.no_grad():
        print(f"forward: {best(lambda: tower.encode(contexts)):.2f} ms")
    print(f"forward and backward: {best(step):.2f} ms")
    parts()


def without_launch(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The engine's products, which write into its memory, do nothing; others are what they were."""

    def replaced(*arguments: torch.Tensor, out: torch.Tensor | None = None, **options: float) -> torch.Tensor:
        return product(*arguments, **options) if out is None else out

    return replaced


def parts() -> None:
    """Of classes drawn from ImageNet's."""
    clip = tiny_clip(width=WIDTH, heads=1, layers=12, vocab_size=49408, embed_dim=WIDTH)
    cfg = reference_cfg(ctx_init="", n_ctx=M, precision="fp32", image_size=IMAGE_SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ImageNet's names that stand for two classes
        layout = PromptLearner(cfg, imagenet_names(CLASSES), clip).layout
    encoder = TreeTextEncoder(clip, ClassTree.from_layout(layout), backend="torch")
    encoder._tower = FusedTower(encoder.tower.constants, triton)  # no GPU here, and "triton" asks for one
    context = torch.zeros(1, M, WIDTH, requires_grad=True)

    def step(classes: torch.Tensor) -> None:
        features = encoder.encode_classes(context, classes)
        features.backward(torch.ones_like(features))

    generator = torch.Generator().manual_seed(0)
    for count in OF_A_PART:
        classes = torch.randperm(CLASSES, generator=generator)[:count]
        took = best(lambda classes=classes: encoder.part(classes), PASSES // 4)
        whole = best(lambda classes=classes: step(classes), PASSES // 4)
        print(
            f"a part of {count} of {CLASSES} classes: {took:.2f} ms to build, {whole:.2f} ms with its forward and backward"
        )


if __name__ == "__main__":
    main()
