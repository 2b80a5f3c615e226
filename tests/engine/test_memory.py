"""What a tower says that it needs is what it allocates; who holds a graph holds its memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_encoders import NAMES, M, tree_of
from tiny_models import tiny_clip
from torch.utils.checkpoint import checkpoint

from cocoop_fast import TreeTextEncoder
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.fused_tower import FusedTower
from cocoop_fast.engine.memory import PeakBytes, parse_bytes
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.shapes import ShapeOps
from cocoop_fast.ops.table import BACKENDS
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.prompts.tree import ClassTree

needs_extension = pytest.mark.skipif(
    CPP.why_unavailable() is not None, reason="the C++ extension is not built"
)


def imagenet_encoder(classes, backend, memory_budget=None, **options):
    """A narrow tower over real class names."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    prompts = tokenize_prompts(IMAGENET_CLASSNAMES[:classes], ctx_init="a photo of a")
    model = tiny_clip(**{"layers": 4, "width": 64, "heads": 2, **options})
    return TreeTextEncoder(
        model, ClassTree(prompts.tokens, prompts.n_ctx), backend=backend, memory_budget=memory_budget
    )


def allocated(tower, batch, *, keeps):
    """The most that was there at once, in a first pass: what later ones use again is allocated in it."""
    width = tower.constants.weights.width
    with PeakBytes() as peak:
        context = torch.zeros(batch, M, width, requires_grad=keeps)
        features = tower.encode(ContextRows(None, context))
        if keeps:
            features.backward(torch.ones_like(features))
    return peak.bytes - context.nbytes - (features.nbytes if keeps else 0)  # the caller's own


@pytest.mark.filterwarnings("ignore:Classes with the same prompt")
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_extension), "torch"])
@pytest.mark.parametrize("keeps", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("classes, batch", [(20, 1), (20, 8), (1000, 1), (1000, 8)])
def test_a_tower_needs_what_it_says(classes, batch, keeps, backend):
    tower = imagenet_encoder(classes, backend).tower
    said = tower.pass_size([tower.constants.tree], batch, keeps=keeps).total
    fresh = imagenet_encoder(classes, backend).tower
    assert said == pytest.approx(allocated(fresh, batch, keeps=keeps), rel=0.02)


@pytest.mark.filterwarnings("ignore:Classes with the same prompt")
@pytest.mark.parametrize(
    "backend, batch, budget",
    [
        *(
            pytest.param("cpu", batch, budget, marks=needs_extension)
            for batch, budget in [(1, "100MB"), (1, "16MB"), (8, "120MB"), (8, "32MB")]
        ),
        ("torch", 1, "24MB"),
        ("torch", 8, "200MB"),
    ],
)
def test_a_step_in_pieces_needs_what_it_says(backend, batch, budget):
    encoder, fresh = (
        imagenet_encoder(1000, backend, memory_budget=budget, width=128, layers=3) for _ in range(2)
    )
    said = encoder.memory.step_bytes(encoder.tower, batch)
    context = torch.zeros(batch, M, encoder.frozen.width, requires_grad=True)
    with PeakBytes() as peak:
        features = fresh(context)
        torch.autograd.grad(features, context, torch.ones_like(features))
    assert peak.bytes <= parse_bytes(budget)
    assert said == pytest.approx(peak.bytes, rel=0.02)


@pytest.mark.filterwarnings("ignore:Classes with the same prompt")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("keeps", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("classes, batch", [(20, 1), (20, 8), (1000, 1), (1000, 8)])
def test_towers_of_gpus_need_what_they_say(classes, batch, keeps, backend):
    """Counted on meta tensors, with the buffers that the backend's kernels ask for."""
    constants = imagenet_encoder(classes, "torch").tower.constants
    load = next(one.load for one in BACKENDS if one.name == backend)
    said = FusedTower(constants, load()).pass_size([constants.tree], batch, keeps=keeps).total
    assert said == pytest.approx(counted(constants, load(), batch, keeps=keeps), rel=0.02)


def counted(constants, ops, batch, *, keeps):
    tower = FusedTower(constants.on_meta(constants.tree), ShapeOps(ops))
    context = torch.zeros(batch, M, constants.weights.width, device="meta", requires_grad=keeps)
    with PeakBytes() as peak:
        features = tower.encode(ContextRows(None, context))
        if keeps:
            features.backward(torch.empty_like(features))
    return peak.bytes - (features.nbytes if keeps else 0)  # the caller's own


@needs_extension
@pytest.mark.filterwarnings("ignore:Classes with the same prompt")
@pytest.mark.parametrize("layers", [1, 2])
def test_shallow_towers_too(layers):
    tower = imagenet_encoder(100, "cpu", layers=layers).tower
    said = tower.pass_size([tower.constants.tree], 2, keeps=True).total
    assert said == pytest.approx(allocated(tower, 2, keeps=True), rel=0.02)


# Graphs and their memory


def encoders():
    """The engine, and the torch tower, on the same weights."""
    from tiny_encoders import encoder

    return encoder(backend="cpu"), encoder(backend="torch")


def context(seed=0):
    return (0.5 * torch.randn(2, M, 48, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def gradients(encoder, compute):
    ctx, other = context(), context(1)
    compute(encoder, ctx, other).backward()
    return ctx.grad, other.grad


def plain(encoder, ctx, other):
    return encoder(ctx).square().sum() + encoder(other).sin().sum()


def under_a_hook_that_copies(encoder, ctx, other):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        return plain(encoder, ctx, other)


def under_save_on_cpu(encoder, ctx, other):
    with torch.autograd.graph.save_on_cpu():
        return plain(encoder, ctx, other)


def checkpointed(encoder, ctx, other):
    return sum(checkpoint(encoder, one, use_reentrant=False).square().sum() for one in (ctx, other))


def checkpointed_by_the_old_way(encoder, ctx, other):
    return sum(checkpoint(encoder, one, use_reentrant=True).square().sum() for one in (ctx, other))


@needs_extension
@pytest.mark.parametrize(
    "compute",
    [plain, under_a_hook_that_copies, under_save_on_cpu, checkpointed, checkpointed_by_the_old_way],
)
def test_two_graphs_never_share_memory(compute):
    engine, twin = encoders()
    for actual, expected in zip(gradients(engine, compute), gradients(twin, compute), strict=True):
        assert float((actual - expected).abs().max() / expected.abs().max()) < 2e-5


@needs_extension
@pytest.mark.parametrize("budget", [None, "600kB"], ids=["whole", "in pieces"])
def test_weights_changed_before_backward_are_noticed(budget):
    for backend in ("cpu", "torch"):
        model = tiny_clip(vocab_size=1000)
        features = TreeTextEncoder(model, tree_of(NAMES), backend=backend, memory_budget=budget)(context())
        with torch.no_grad():
            model.transformer.resblocks[1].mlp.c_fc.weight.mul_(1.01)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed in place"):
            features.sum().backward()


@needs_extension
def test_packed_copies_follow_a_change_that_autograd_does_not_count():
    model = tiny_clip(vocab_size=1000)
    engine = TreeTextEncoder(model, tree_of(NAMES), backend="cpu")
    before = engine(context())
    for block in model.transformer.resblocks:
        block.mlp.c_fc.weight.data.mul_(1.1)
        block.attn.in_proj_weight.data.copy_(torch.randn_like(block.attn.in_proj_weight) * 0.1)
    after, twin = engine(context()), TreeTextEncoder(model, tree_of(NAMES), backend="torch")(context())
    with torch.no_grad():
        assert float((after - twin).abs().max()) < 2e-5 < float((after - before).abs().max())


@needs_extension
def test_two_threads_train_at_once():
    engine, twin = encoders()
    contexts = [context(seed) for seed in range(8)]

    def gradient(ctx):
        return torch.autograd.grad(engine(ctx).square().sum(), ctx)[0]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(gradient, contexts * 5))
    for ctx, actual in zip(contexts * 5, found, strict=True):
        (expected,) = torch.autograd.grad(twin(ctx).square().sum(), ctx)
        assert float((actual - expected).abs().max() / expected.abs().max()) < 2e-5
