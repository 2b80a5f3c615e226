"""Tail pruning: what is kept, the bound on what is left out, and the gradient that remains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import M, encoder
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import CustomCLIP, UserError
from cocoop_fast.engine.pruning import (
    backward_through,
    check_prune_mass,
    classes_to_keep,
    pruned_cross_entropy,
)
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.ops.head import cosine_logits_ref


@settings(max_examples=100)
@given(
    batch=st.integers(1, 4),
    k=st.integers(1, 30),
    tau=st.floats(0, 0.99),
    sharpness=st.floats(0, 40),
    seed=st.integers(0, 2**31),
)
def test_what_is_left_out_is_bounded_and_the_least(batch, k, tau, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    p = (sharpness * torch.randn(batch, k, generator=generator, dtype=torch.float64)).softmax(dim=1)
    label = torch.randint(k, (batch,), generator=generator)
    keep = classes_to_keep(p, label, tau)
    for row, own, kept in zip(p.tolist(), label.tolist(), keep.tolist(), strict=True):
        assert kept[own]
        others = [q for i, q in enumerate(row) if i != own]
        allowed = tau * sum(others)
        left = [row[i] for i in range(k) if not kept[i]]
        assert sum(left) <= allowed * (1 + 1e-12)
        kept_others = [row[i] for i in range(k) if kept[i] and i != own]
        if left and kept_others:
            assert max(left) <= min(kept_others), "a likelier class was left out"
        if kept_others:
            assert sum(left) + min(kept_others) > allowed * (1 - 1e-12), "one more could have been left out"


def problem(batch, scale, dtype=torch.float64):
    one = encoder(dtype, "torch" if dtype == torch.float64 else "auto")
    generator = torch.Generator().manual_seed(2)
    ctx = 0.5 * torch.randn(batch, M, 48, generator=generator).to(dtype)
    image = F.normalize(torch.randn(batch, 64, generator=generator).to(dtype), dim=-1)
    label = torch.randint(62, (batch,), generator=generator)
    return one, ctx, image, torch.tensor(scale, dtype=dtype).log(), label


def exact(one, ctx, image, scale, label):
    ctx = ctx.clone().requires_grad_()
    logits = cosine_logits_ref(image, one(ctx), scale)
    loss = F.cross_entropy(logits, label)
    return loss.detach(), logits.detach(), torch.autograd.grad(loss, ctx)[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_exact_where_nothing_is_left_out(batch):
    one, ctx, image, scale, label = problem(batch, 2.0)
    loss, logits, gradient = exact(one, ctx, image, scale, label)
    leaf = ctx.clone().requires_grad_()
    actual, actual_logits, pruned = pruned_cross_entropy(one, leaf, image, scale, label, 1e-9)
    assert pruned.classes_kept == 62
    assert pruned.share_left_out == 0
    assert_close(actual.detach(), loss, 1e-13)
    assert_close(actual_logits, logits, 1e-13)
    assert_close(torch.autograd.grad(3 * actual, leaf)[0], 3 * gradient, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tau", [0.001, 0.01, 0.1])
def test_the_gradient_of_what_is_kept(tau, dtype):
    """The classes kept take over what is left out, and its share obeys the bound."""
    one, ctx, image, scale, label = problem(2, 150.0, dtype)
    loss, logits, _ = exact(one, ctx, image, scale, label)
    leaf = ctx.clone().requires_grad_()
    actual, _, pruned = pruned_cross_entropy(one, leaf, image, scale, label, tau)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert_close(actual.detach(), loss, tolerance)
    assert 2 <= pruned.classes_kept < 62
    assert 0 < pruned.share_left_out <= tau / 2 + 1e-9

    p = logits.double().softmax(dim=1)
    keep = classes_to_keep(p, label, tau)  # of each image
    others = torch.where(keep & (F.one_hot(label, 62) == 0), p, 0.0)
    wrong = 1 - p.gather(1, label[:, None])
    weights = others * wrong / others.sum(dim=1, keepdim=True) - F.one_hot(label, 62) * wrong
    moved = (weights - (p - F.one_hot(label, 62))).abs().sum(dim=1)
    assert bool((moved <= tau * 2 * wrong[:, 0] + 1e-9).all()), "the weights moved by more than a tau share"
    weights = (weights / 2).to(dtype)
    again = ctx.clone().requires_grad_()
    (expected,) = torch.autograd.grad((cosine_logits_ref(image, one(again), scale) * weights).sum(), again)
    assert_close(torch.autograd.grad(actual, leaf)[0], expected, tolerance)


def test_float16_goes_backward_under_the_scale_of_the_loss():
    """Rare classes have weights below what float16 can hold."""
    classes = torch.arange(0, 62, 7)
    weights = 1e-7 * torch.randn(2, len(classes), generator=torch.Generator().manual_seed(4))

    def gradient(dtype, scale):
        _, ctx, image, logit_scale, _ = problem(2, 30.0)
        one, ctx = encoder(dtype, "torch"), ctx.clone().requires_grad_()
        loss = backward_through(
            one, ctx.to(dtype), image.to(dtype), logit_scale.to(dtype), torch.tensor(1.0), classes, weights
        )
        return torch.autograd.grad(scale * loss, ctx)[0] / scale

    expected = gradient(torch.float64, 1.0)
    for scale, most in ((1.0, None), (2.0**16, 0.01)):
        error = float((gradient(torch.float16, scale) - expected).abs().max() / expected.abs().max())
        assert error > 0.05 if most is None else error < most


def test_an_images_gradient_does_not_depend_on_its_batch():
    """So ranks that share images out go the way of one process."""
    one, ctx, image, scale, label = problem(3, 60.0)
    leaf = ctx.clone().requires_grad_()
    loss, _, together = pruned_cross_entropy(one, leaf, image, scale, label, 0.2)
    gradient = torch.autograd.grad(loss, leaf)[0]
    alone = []
    for i in range(3):
        own = slice(i, i + 1)
        leaf = ctx[own].clone().requires_grad_()
        loss, _, pruned = pruned_cross_entropy(one, leaf, image[own], scale, label[own], 0.2)
        alone.append((torch.autograd.grad(loss, leaf)[0] / 3, pruned))
    assert_close(gradient, torch.cat([one for one, _ in alone]), 1e-11)
    assert max(one.classes_kept for _, one in alone) < together.classes_kept  # they keep different ones
    shares = [one.share_left_out for _, one in alone]
    assert together.share_left_out == pytest.approx(sum(shares) / 3, rel=1e-6)


def test_together_with_streaming():
    one, ctx, image, scale, label = problem(3, 150.0, torch.float32)
    small = encoder(memory_budget="5MB")
    results = []
    for each in (one, small):
        leaf = ctx.clone().requires_grad_()
        loss, logits, _pruned = pruned_cross_entropy(each, leaf, image, scale, label, 0.01)
        results.append([loss.detach(), logits, torch.autograd.grad(loss, leaf)[0]])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("tau", [-0.1, 1, 1.5, float("nan")])
def test_bad_prune_mass(tau):
    with pytest.raises(UserError, match="`prune_mass` must be at least 0"):
        check_prune_mass(tau)


def test_the_model_prunes_in_training_alone():
    cfg = reference_cfg(ctx_init="a photo of a", n_ctx=4, precision="fp32", image_size=IMAGE_SIZE)
    names = [f"thing {i}" for i in range(30)]
    torch.manual_seed(0)
    clip = tiny_clip()
    exact_model = CustomCLIP(cfg, names, clip)
    pruned_model = CustomCLIP(cfg, names, clip, prune_mass=0.2, memory_budget="2GB")
    pruned_model.prompt_learner.load_state_dict(exact_model.prompt_learner.state_dict())
    features, label = torch.randn(4, 64), torch.tensor([0, 5, 9, 29])
    losses = [model.forward_features(features, label) for model in (exact_model, pruned_model)]
    assert_close(losses[1].detach(), losses[0].detach(), 1e-5)
    assert exact_model.pruned is None
    assert pruned_model.pruned is not None
    assert pruned_model.pruned.share_left_out <= 0.1
    losses[1].backward()
    assert pruned_model.prompt_learner.ctx.grad.abs().sum() > 0
    for model in (exact_model, pruned_model):
        model.prompt_learner.eval()
    with torch.no_grad():
        assert_close(
            pruned_model.forward_features(features), exact_model.forward_features(features), 1e-5, "logits"
        )
    with pytest.raises(UserError, match="`prune_mass` must be"):
        CustomCLIP(cfg, names, clip, prune_mass=1.0)
    with pytest.raises(UserError, match="is not an amount of memory"):
        CustomCLIP(cfg, names, clip, memory_budget="lots")
