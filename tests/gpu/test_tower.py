"""The text tower on a GPU against the torch tower in float64, forward and backward."""

import pytest
import torch
from attention_cases import random_names, tree_of
from tiny_models import tiny_clip

from cocoop_fast import TreeTextEncoder
from cocoop_fast.ops.table import BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda")


def run(model, tree, backend, ctx, grad):
    """Features and the gradient of the context, in float64 on the CPU."""
    ctx = ctx.detach().clone().to(next(model.parameters()).device).requires_grad_()
    features = TreeTextEncoder(model, tree, backend=backend)(ctx)
    features.backward(grad.to(features))
    return features.detach().cpu().double(), ctx.grad.cpu().double()


def error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_tower(backend, dtype):
    """No further from float64 than twice what torch's own operations in this type are."""
    (chosen,) = (one for one in BACKENDS if one.name == backend)
    if reason := chosen.refusal(GPU, dtype):
        pytest.skip(reason)
    tree = tree_of(random_names(40, 5, 5, seed=3))
    generator = torch.Generator().manual_seed(0)
    model = tiny_clip(width=64, heads=2, dtype=torch.float64)
    ctx = torch.randn(3, tree.n_ctx, 64, generator=generator, dtype=torch.float64)
    grad = torch.randn(3, tree.n_classes, 64, generator=generator, dtype=torch.float64)
    expected = run(model, tree, "torch", ctx, grad)
    model = model.to(GPU, dtype)
    plain = run(model, tree, "torch", ctx.to(dtype), grad)
    fast = run(model, tree, backend, ctx.to(dtype), grad)
    for name, ours, theirs, exact in zip(("features", "gradient"), fast, plain, expected, strict=True):
        bound = 2 * error(theirs, exact) + 4 * torch.finfo(dtype).eps
        assert error(ours, exact) <= bound, f"{name}: {error(ours, exact):.2e} > {bound:.2e}"
    for once, again in zip(fast, run(model, tree, backend, ctx.to(dtype), grad), strict=True):
        assert torch.equal(once, again)
