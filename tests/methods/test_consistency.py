"""The consistency loss against the formula over the dense oracle's text features; and what it cannot be combined with."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import CustomCLIP, UserError
from cocoop_fast.distributed.class_shards import ClassShards
from cocoop_fast.distributed.ranks import Group
from cocoop_fast.methods import CoOp, ZeroShot
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.methods.consistency import Consistency
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.reference import DensePromptedCLIP, encode_prompts, place_contexts

needs_extension = pytest.mark.skipif(
    CPP.why_unavailable() is not None, reason="the C++ extension is not built"
)
NAMES = ["cat", "tabby cat", "tabby", "digit zero", "digit one", "old dog", "dog"]
TEMPLATES = ("a photo of a {}.", "art of the {}.", "itap of a {}.")
L1, COSINE = Consistency("l1", 25.0, 1.5, TEMPLATES), Consistency("cosine", 8.0, 0.5, TEMPLATES)


def cfg(**options):
    return reference_cfg(ctx_init="", n_ctx=3, precision="fp32", image_size=IMAGE_SIZE, **options)


def learned(model):
    return dict(model.prompt_learner.named_parameters())


def models(consistency, kind=CustomCLIP, dtype=torch.float32, **engine):
    """The fast model in ``dtype`` and its dense oracle in float64, with the same random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip_model = tiny_clip().to(dtype)
        wide = copy.deepcopy(clip_model).double()
        fast = kind(cfg(), NAMES, clip_model, **engine)
        for parameter in fast.prompt_learner.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    fast.keep_near(lambda names: consistency.anchor(names, clip_model), NAMES)
    dense = DensePromptedCLIP(wide, NAMES, ctx_init="", n_ctx=3, conditional=kind is CustomCLIP)
    dense.prompt_learner.load_state_dict({name: one.detach() for name, one in learned(fast).items()})
    return fast, dense


def inputs(batch, dtype):
    random = torch.Generator().manual_seed(7)
    features = torch.randn(batch, tiny_clip().text_projection.shape[1], generator=random, dtype=torch.float64)
    return features.to(dtype), torch.arange(batch) % len(NAMES)


def oracle_loss(dense, consistency, features, label):
    """Term by term, an image at a time, in the words of the two papers."""
    x = features.double() / features.double().norm(dim=-1, keepdim=True)
    scale = dense.logit_scale.exp()
    hand_written = torch.stack(
        [ZeroShot(one, NAMES, dense.clip_model).mean_features for one in consistency.templates]
    ).mean(dim=0)
    near = (hand_written / hand_written.norm(dim=-1, keepdim=True)).detach()
    losses = []
    for image, own in zip(x, label, strict=True):
        ctx = dense.prompt_learner.context(image).expand(len(NAMES), -1, -1)
        prompts = place_contexts(dense.embedding, ctx, dense.name_lens, "end")
        text = encode_prompts(dense.clip_model, prompts, dense.tokens)
        text = text / text.norm(dim=-1, keepdim=True)
        z, told = scale * image @ text.T, scale * image @ near.T
        loss = F.cross_entropy(z[None], own[None])
        if consistency.distance == "l1":
            loss = loss + consistency.text_weight * (text - near).abs().mean()
        else:
            loss = loss + consistency.text_weight * (1 - (text * near).sum(dim=1)).mean()
        p, q = z.softmax(dim=0), told.softmax(dim=0)
        losses.append(loss + consistency.logit_weight * (q * (q.log() - p.log())).sum() / len(NAMES))
    return torch.stack(losses).mean()


def compare(fast, dense, consistency, batch, tolerance):
    features, label = inputs(batch, fast.dtype)
    loss, _ = fast.loss_and_logits(features, label)
    expected = oracle_loss(dense, consistency, features, label)
    assert_close(loss, expected, tolerance, "loss")
    gradients = torch.autograd.grad(3 * loss, list(learned(fast).values()))
    wanted = torch.autograd.grad(3 * expected, list(learned(dense).values()))
    for name, gradient, one in zip(learned(fast), gradients, wanted, strict=True):
        assert_close(gradient, one, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("consistency", [L1, COSINE], ids=["l1", "cosine"])
@pytest.mark.parametrize("batch", [1, 4])
class TestEquality:
    def test_in_float64(self, consistency, batch):
        fast, dense = models(consistency, dtype=torch.float64, backend="torch")
        compare(fast, dense, consistency, batch, 1e-10)

    @pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
    def test_in_float32(self, consistency, batch, backend):
        fast, dense = models(consistency, backend=backend)
        compare(fast, dense, consistency, batch, 2e-5)

    def test_streamed(self, consistency, batch):
        whole, dense = models(consistency)
        whole.tree_encoder.lower_memory(batch)
        compare(whole, dense, consistency, batch, 2e-5)

    def test_with_one_context_for_all_images(self, consistency, batch):
        fast, dense = models(consistency, kind=CoOp, dtype=torch.float64, backend="torch")
        compare(fast, dense, consistency, batch, 1e-10)


@pytest.mark.parametrize("consistency", [L1, COSINE], ids=["l1", "cosine"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter computes on the CPU")
def test_on_triton(consistency):
    pytest.importorskip("triton.runtime.interpreter")
    fast, dense = models(consistency, backend="triton")
    compare(fast, dense, consistency, 2, 2e-5)


def test_hand_written_prompts_themselves_cost_nothing():
    """A context whose prompts are those of the anchor: the distance and the divergence are zero."""
    clip_model = tiny_clip().double()
    model = CoOp(
        reference_cfg(ctx_init="a photo of a", n_ctx=4, precision="fp32", image_size=IMAGE_SIZE),
        NAMES,
        clip_model,
    )
    features, label = inputs(3, torch.float64)
    plain, _ = model.loss_and_logits(features, label)
    model.keep_near(lambda names: Consistency("l1", 25, 1, TEMPLATES[:1]).anchor(names, clip_model), NAMES)
    near, _ = model.loss_and_logits(features, label)
    assert near.item() == pytest.approx(plain.item(), rel=1e-6)  # the context is kept in float32


def test_the_anchor_is_that_of_the_classes_there_are():
    fast, _ = models(L1)
    assert fast.anchor.features.shape[0] == len(NAMES)
    fast.set_classnames(["cat", "horse"])
    assert fast.anchor.features.shape[0] == 2
    features, _ = inputs(2, torch.float32)
    loss, _ = fast.loss_and_logits(features, torch.tensor([1, 0]))
    assert loss.isfinite()
    assert_close(fast.anchor.features.norm(dim=1), torch.ones(2), 1e-6)


def test_what_was_unfrozen_on_purpose_stays_so():
    fast, _ = models(L1)
    fast.logit_scale.requires_grad_(True)
    features, label = inputs(2, torch.float32)
    fast.loss_and_logits(features, label)[0].backward()
    assert fast.logit_scale.requires_grad and fast.logit_scale.grad is not None


def test_what_leaves_classes_out_is_refused():
    with pytest.raises(UserError, match="Pruning leaves classes out"):
        models(L1, prune_mass=0.01)


@dataclass(frozen=True)
class _Pair(Group):
    """Two ranks that are threads."""

    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))
    said: dict = field(default_factory=dict)

    def gather(self, tensor):
        self.said[self.index] = tensor
        self.meeting.wait()
        values = [self.said[0], self.said[1]]
        self.meeting.wait()
        return values


@pytest.mark.parametrize("kind", [CustomCLIP, CoOp])
@pytest.mark.parametrize("consistency", [L1, COSINE], ids=["l1", "cosine"])
def test_classes_shared_out_among_ranks(consistency, kind):
    """The loss on each rank is the whole one, and the gradient the sum of the ranks' own."""
    features, label = inputs(3, torch.float64)
    pair = _Pair(0, 2)
    ranks = [models(consistency, kind, torch.float64, backend="torch") for _ in range(2)]

    def rank(index):
        fast, _ = ranks[index]
        loss, logits = ClassShards(fast, replace(pair, index=index)).loss_and_logits(features, label)
        return loss.detach(), logits, torch.autograd.grad(loss, list(learned(fast).values()))

    with ThreadPoolExecutor(2) as threads:
        parts = list(threads.map(rank, range(2)))
    _, dense = ranks[0]
    expected = oracle_loss(dense, consistency, features, label)
    wanted = torch.autograd.grad(expected, list(learned(dense).values()))
    for loss, _, gradients in parts:
        assert_close(loss, expected.detach(), 1e-10, "loss")
        assert any((one - whole).abs().max() > 1e-6 for one, whole in zip(gradients, wanted, strict=True))
    for name, one, other, whole in zip(learned(dense), parts[0][2], parts[1][2], wanted, strict=True):
        assert_close(one + other, whole, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("meta_nets", [1, 3])
def test_ablating_the_image(meta_nets):
    from cocoop_fast.methods.meta_nets import MetaNetsCLIP

    kind = CustomCLIP if meta_nets == 1 else MetaNetsCLIP
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip_model = tiny_clip()
        plain, blind = kind(cfg(), NAMES, clip_model), kind(cfg(ablate_image=True), NAMES, clip_model)
    assert plain.prompt_learner.state_dict().keys() == blind.prompt_learner.state_dict().keys()
    blind.prompt_learner.load_state_dict(plain.prompt_learner.state_dict())
    features, label = inputs(4, torch.float32)
    shifts = blind.prompt_learner.shift(features)
    assert (shifts == shifts[:1]).all() and shifts.abs().max() > 0
    assert not (plain.prompt_learner.shift(features) == shifts).all()
    drawn = blind.prompt_learner._stand_in
    assert_close(plain.prompt_learner.shift(drawn.expand_as(features)), shifts, 1e-6)
    loss, _ = blind.loss_and_logits(features, label)
    gradients = torch.autograd.grad(loss, list(learned(blind).values()))
    assert all(
        one.abs().max() > 0 for name, one in zip(learned(blind), gradients, strict=True) if "bias" in name
    )
