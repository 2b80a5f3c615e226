"""A float32 model whose text tower computes in half precision, as "amp" means it on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparison import assert_close
from tiny_encoders import M, tree_of
from tiny_models import tiny_clip
from tiny_runs import loaded_tiny_clip
from tiny_training import clip_model

from cocoop_fast import TreeTextEncoder
from cocoop_fast.clip.load import to_low_precision
from cocoop_fast.config import PromptConfig
from cocoop_fast.methods import build_model
from cocoop_fast.training.precision import LossScaler, needs_loss_scaling
from cocoop_fast.training.step import loss_and_gradients

CLASSES = [[1], [1, 2], [1, 2, 4], [5, 3]]


def encoders(backend, dtype, device="cpu", **options):
    """A float32 model with a tower of this type, and a model that is of it whole."""
    low = tiny_clip(vocab_size=1000).to(device)
    to_low_precision(low, dtype)
    wide = tiny_clip(vocab_size=1000).to(device)
    of_wide = TreeTextEncoder(wide, tree_of(CLASSES), backend=backend, text_dtype=dtype, **options)
    return of_wide, TreeTextEncoder(low, tree_of(CLASSES), backend=backend, **options)


def features_and_gradient(encoder, ctx):
    ctx = ctx.clone().requires_grad_()
    features = encoder(ctx)
    features.float().square().sum().backward()
    return features.detach(), ctx.grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_it_computes_what_a_half_precision_model_does(backend, dtype):
    device = torch.device("cpu")
    if backend == "triton":
        pytest.importorskip("triton")  # which runs its kernels on the CPU where there is no GPU
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    amp, low = encoders(backend, dtype, device)
    ctx = 0.5 * torch.randn(2, M, amp.frozen.width, generator=torch.Generator().manual_seed(0)).to(device)
    features, gradient = features_and_gradient(amp, ctx)
    expected, expected_gradient = features_and_gradient(low, ctx)
    assert features.dtype == gradient.dtype == torch.float32 and expected.dtype == dtype
    assert amp.tower.constants.weights.dtype == dtype and amp.frozen.dtype == torch.float32
    assert features.equal(expected.float())
    assert_close(gradient, expected_gradient, 1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_the_models_weights_are_not_touched_and_changes_are_seen():
    encoder, _ = encoders("torch", torch.float16)
    ctx = torch.zeros(1, M, encoder.frozen.width)
    before = encoder(ctx)
    with torch.no_grad():
        encoder.frozen._resblocks[0].mlp.c_fc.weight *= 1.5
    assert not encoder(ctx).equal(before)
    assert encoder.frozen._resblocks[0].mlp.c_fc.weight.dtype == torch.float32


def test_a_part_of_the_classes_and_budgets_know_of_it():
    amp, low = encoders("torch", torch.float16)
    ctx = torch.randn(2, M, amp.frozen.width, generator=torch.Generator().manual_seed(1))
    some = torch.tensor([3, 1])
    assert amp.encode_classes(ctx, some).dtype == torch.float32
    torch.testing.assert_close(amp.encode_classes(ctx, some), amp(ctx)[:, some], rtol=2e-2, atol=2e-3)
    weights = amp.tower.constants.weights
    parts = (
        getattr(block, name) for block in weights.blocks for name in ("in_proj", "out_proj", "fc", "proj")
    )
    copied = 2 * sum(one.weight.numel() + one.bias.numel() for one in (*parts, weights.projection))
    assert weights.copied_bytes == copied
    assert amp.memory.step_bytes(amp.tower, 2) > low.memory.step_bytes(low.tower, 2) + copied


@pytest.mark.parametrize(
    "precision, device, dtype", [("amp", "cuda", torch.float16), ("amp", "cpu", None), ("fp32", "cuda", None)]
)
def test_amp_means_float16_on_a_gpu(precision, device, dtype):
    loaded = replace(loaded_tiny_clip(), precision=precision, device=torch.device(device))
    assert loaded.text_dtype == dtype
    model = build_model(PromptConfig(), ["cat", "dog"], loaded, backend="torch")
    assert model.tree_encoder.frozen.text_weights().dtype == (dtype or torch.float32)
    assert model.dtype == model.prompt_learner.ctx.dtype == torch.float32


def test_small_gradients_survive_by_the_loss_scale():
    """Of a sure model the loss has gradients that float16 rounds to nothing; scaled they are those of float32."""
    found = {}
    for dtype, scaled in ((None, False), (torch.float16, True), (torch.float16, False)):
        torch.manual_seed(1)
        loaded = replace(loaded_tiny_clip(), model=clip_model(torch.float32))
        model = build_model(
            PromptConfig(), ["cat", "dog", "a car"], loaded, backend="torch", text_dtype=dtype
        )
        model.prompt_learner.train()
        loss_and_logits = model.loss_and_logits
        model.loss_and_logits = lambda *a, f=loss_and_logits: (f(*a)[0] * 1e-6, f(*a)[1])
        scaler = LossScaler(torch.device("cpu"), enabled=scaled)
        step = loss_and_gradients(model, list(model.prompt_learner.parameters()), "fp32", scaler)
        features = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
        result = step(features, torch.tensor([0, 2]))
        found[dtype, scaled] = result.gradients[0] / scaler.current()
    exact = found[None, False]
    assert needs_loss_scaling("amp", True, torch.device("cuda"))
    assert_close(found[torch.float16, True], exact, 2e-2)
    assert (found[torch.float16, False] - exact).abs().max() > 0.1 * exact.abs().max()
