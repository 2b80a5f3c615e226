"""Prints the forms that a training step launches and no variant has, for a GPU of each vendor that is not there.

Run by test_compiled_kernels.py in a process of its own, as Triton must not be in its interpreter. What a form is, the
just-in-time compiler's own binder says.
"""

from __future__ import annotations

import importlib

import compile_kernels  # first: it keeps Triton out of the interpreter
import torch
from tiny_encoders import tree_of
from tiny_models import tiny_clip
from triton.runtime.jit import JITFunction
from triton_without_gpu import compile_launch, target_of_launches

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.engine.constants import compute_constants
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.fused_tower import FusedTower
from cocoop_fast.ops import triton, triton_small
from cocoop_fast.ops.head import _CosineCrossEntropy
from cocoop_fast.ops.meta_net import _MetaNet

tree_attention = importlib.import_module("cocoop_fast.kernels.tree_attention")
seen: set[tuple[object, ...]] = set()


def note(self, *args, grid, warmup, **kwargs):
    """In place of a launch: what it would compile."""
    _, _, _, backend, binder = self.device_caches[compile_kernels.triton.runtime.driver.active.number]
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attributes = self._pack_args(
        backend, kwargs, bound, specialization, options
    )
    fixed = {self.arg_names[path[0]]: value for path, value in constexprs.items()}
    marks = {self.arg_names[path[0]]: str(value) for path, value in attributes.items() if value}
    parts = signature, fixed, marks, {"warps": options.num_warps, "stages": options.num_stages}
    seen.add((self.fn.__name__, *(frozenset(part.items()) for part in parts)))


def train_one_step(dtype: torch.dtype, names: list[list[int]]) -> None:
    """Over CLIP's width; what it computes is nothing."""
    clip = tiny_clip(width=512, heads=8, dtype=dtype, vocab_size=1000, embed_dim=512)
    constants = compute_constants(FrozenCLIP(clip).text_weights(), tree_of(names))
    ctx, shift = (torch.zeros(*shape, requires_grad=True) for shape in ((4, 512), (2, 512)))
    tower = FusedTower(constants, triton)
    features = constants.classes(tower.encode(ContextRows(ctx, shift)), triton)
    image = torch.zeros(2, 512, dtype=dtype)
    label = torch.zeros(2, dtype=torch.int64)
    loss, logits = _CosineCrossEntropy.apply(features, image, torch.ones(1), label, triton, None)
    loss.backward()
    triton_small.unit_rows(image, image)
    weights = [torch.zeros(*shape, requires_grad=True) for shape in ((32, 512), (32,), (512, 32), (512,))]
    _MetaNet.apply(image, *weights, triton_small).sum().backward()
    gradients = [torch.zeros(3)] * 2
    copies, report, shared = torch.zeros(6), torch.zeros(5), torch.zeros(3, dtype=torch.int32)
    triton_small.step_report(loss.detach(), logits, label, torch.ones(()), gradients, copies, shared, report)


def _unlike(form: tuple[object, ...]) -> str:
    """In what it differs from the variant that is most like it."""
    differences = [
        [sorted(map(str, ours ^ theirs)) for ours, theirs in zip(form[1:], other[1:], strict=True)]
        for other in seen
        if other[0] == form[0]
    ]
    return str(min(differences, key=lambda one: sum(map(len, one)), default="of a kernel without variants"))


def main() -> None:
    JITFunction.run = note
    for name in ("sm_90", "gfx942"):
        target = compile_kernels.TARGETS[name]
        tree_attention.ONE_LOAD = target.backend != "hip"
        with target_of_launches(target):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                train_one_step(dtype, [[1, 2], [1, 2, 3], [2]])
                train_one_step(dtype, [[5] * 40, [1] * 30])
        launched, _ = set(seen), seen.clear()
        for module in compile_kernels.kernel_modules():
            for variant in importlib.import_module(module).VARIANTS:
                compile_launch(variant, target)
        print(f"{name}: {len(launched)} launched")
        for form in sorted(launched - seen, key=str):
            print(f"{name}: no variant is {form[0]} {_unlike(form)}")
        seen.clear()


if __name__ == "__main__":
    main()
