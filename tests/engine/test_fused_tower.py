"""The fused tower on a CPU against its torch twin in float64: features, gradients, memory, refusals."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import ClassTree, CustomCLIP, TreeTextEncoder, UserError
from cocoop_fast.engine.contexts import ShiftedContext
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.ops.cpu import available_isas, set_isa
from cocoop_fast.ops.extensions import CPP

pytestmark = pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")

SOS, EOT = 900, 999


def token_rows(paths, n_ctx, length):
    ids = torch.zeros(len(paths), length, dtype=torch.int64)
    for k, path in enumerate(paths):
        row = [SOS, *[7] * n_ctx, *path, EOT]
        ids[k, : len(row)] = torch.tensor(row)
    return ids


def small_clip(dtype=torch.float32, **options):
    return tiny_clip(dtype=dtype, vocab_size=1000, **options)


PATHS = [[5, 3], [1, 2], [1], [1, 2, 4], [5, 3], [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]]


def encoders(paths=PATHS, n_ctx=4, length=77, **options):
    """The engine in float32, its twin in float64."""
    tree = ClassTree(token_rows(paths, n_ctx, length), n_ctx)
    engine = TreeTextEncoder(small_clip(**options), tree, backend="cpu")
    twin = TreeTextEncoder(small_clip(torch.float64, **options), tree, backend="torch")
    return engine, twin


def context(batch, n_ctx, width=48, seed=0):
    return 0.5 * torch.randn(batch, n_ctx, width, generator=torch.Generator().manual_seed(seed))


def features_and_gradient(encoder, ctx, seed=0):
    ctx = ctx.to(encoder.frozen.dtype).requires_grad_()
    features = encoder(ctx)
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed)).to(features)
    (gradient,) = torch.autograd.grad((features * probe).sum(), ctx)
    return features.detach(), gradient


def compare(engine, twin, ctx):
    features, gradient = features_and_gradient(engine, ctx)
    expected_features, expected_gradient = features_and_gradient(twin, ctx)
    assert_close(features, expected_features, 1e-5, "features")
    assert_close(gradient, expected_gradient, 2e-5, "gradient of ctx")


@pytest.mark.parametrize("isa", available_isas() if (CPP.why_unavailable() is None) else [])
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_equals_the_twin(isa, layers, quick_gelu):
    widest = available_isas()[-1]
    set_isa(isa)
    try:
        for n_ctx, batch in [(1, 1), (4, 3), (16, 2)]:
            engine, twin = encoders(n_ctx=n_ctx, layers=layers, quick_gelu=quick_gelu)
            compare(engine, twin, context(batch, n_ctx))
    finally:
        set_isa(widest)


def deep_prompts(encoder, n_deep, batch=3, n_ctx=3, shifted=False):
    """Features, and the gradients of the context and of the prompts of the layers above."""
    rows = [context(batch, n_ctx, seed=seed) for seed in range(1 + n_deep)]
    vectors = [context(1, n_ctx, seed=99)[0]] if shifted else []
    ours = [one.to(encoder.frozen.dtype).requires_grad_() for one in (*vectors, *rows)]
    *first, ctx = ours[: 1 + len(vectors)]
    features = encoder(ShiftedContext(*first, ctx) if shifted else ctx, ours[1 + len(vectors) :])
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
    return features, *torch.autograd.grad((features * probe).sum(), ours)


@pytest.mark.parametrize("isa", available_isas() if (CPP.why_unavailable() is None) else [])
@pytest.mark.parametrize(("layers", "n_deep"), [(2, 1), (4, 2)])  # up to the last layer, and not
def test_deep_prompts_equal_the_twin(isa, layers, n_deep, monkeypatch):
    monkeypatch.setattr("cocoop_fast.ops.cpu.PANEL_ROWS", 7)
    widest = available_isas()[-1]
    set_isa(isa)
    try:
        engine, twin = encoders(n_ctx=3, layers=layers)
        for options in ({}, {"batch": 1, "shifted": True}):
            results = [deep_prompts(one, n_deep, **options) for one in (engine, twin)]
            for layer, (actual, expected) in enumerate(zip(*results, strict=True)):
                assert_close(actual, expected, 2e-5, f"{options}: result {layer}")
    finally:
        set_isa(widest)


def test_deep_prompts_reuse_the_memory_of_plain_contexts():
    """Plain contexts before and after are what they are without any deep prompt, to the bit."""
    engine, twin = encoders(n_ctx=3, layers=3)
    plain = features_and_gradient(engine, context(3, 3))
    held = engine.tower.pooled_bytes
    deeper = [deep_prompts(engine, 2) for _ in range(2)]
    assert all(one.equal(other) for one, other in zip(*deeper, strict=True))
    again = features_and_gradient(engine, context(3, 3))
    assert all(one.equal(other) for one, other in zip(plain, again, strict=True))
    assert engine.tower.pooled_bytes <= 1.01 * held
    with torch.no_grad():
        features = engine(context(3, 3), [context(3, 3, seed=1)])
        assert_close(features, twin(context(3, 3).double(), [context(3, 3, seed=1).double()]), 1e-5)


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (96, 3), (80, 1), (40, 2)])
def test_head_sizes(width, heads):
    engine, twin = encoders(width=width, heads=heads)
    compare(engine, twin, context(2, 4, width))


tokens = st.lists(st.integers(1, 5), min_size=1, max_size=60)
short_tokens = st.lists(st.integers(1, 9), min_size=1, max_size=5)
class_lists = st.one_of(
    st.lists(tokens, min_size=1, max_size=12), st.lists(short_tokens, min_size=1, max_size=300)
)
LONG = {"context_length": 100, "layers": 2, "width": 32, "heads": 2}
FUZZED = {
    (quick_gelu, dtype): small_clip(dtype, quick_gelu=quick_gelu, **LONG)
    for quick_gelu in (True, False)
    for dtype in (torch.float32, torch.float64)
}


@settings(max_examples=150)
@given(class_lists, st.integers(1, 32), st.integers(1, 2), st.booleans(), st.integers(0, 9))
def test_fuzzed_trees(paths, n_ctx, batch, quick_gelu, seed):
    tree = ClassTree(token_rows(paths, n_ctx, 100), n_ctx)
    engine = TreeTextEncoder(FUZZED[quick_gelu, torch.float32], tree, backend="cpu")
    twin = TreeTextEncoder(FUZZED[quick_gelu, torch.float64], tree, backend="torch")
    compare(engine, twin, context(batch, n_ctx, LONG["width"], seed))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_panels_change_nothing(layers, monkeypatch):
    engine, twin = encoders(layers=layers)
    assert engine.tree.rows > 20
    monkeypatch.setattr("cocoop_fast.ops.cpu.PANEL_ROWS", 7)
    compare(engine, twin, context(3, 4))
    with torch.no_grad():
        assert_close(engine(context(3, 4)), twin(context(3, 4).double()), 1e-5)


def test_without_gradients():
    engine, twin = encoders()
    ctx = context(5, 4)
    expected = twin(ctx.double())
    with torch.no_grad():
        assert_close(engine(ctx), expected, 1e-5)
    assert_close(engine(ctx), expected, 1e-5)
    training = engine.tower.pass_size([engine.tree], 5, keeps=True).total
    assert 0 < engine.tower.pooled_bytes < training / 2, "buffers for backward were borrowed in vain"


def test_strided_context():
    engine, twin = encoders()
    wide = context(2, 8, 96)
    compare(engine, twin, wide[:, ::2, ::2])


def test_two_graphs_at_once_and_a_graph_used_twice():
    engine, _ = encoders()
    one, other = (context(2, 4, seed=seed).requires_grad_() for seed in (1, 2))
    alone = [features_and_gradient(engine, ctx.detach())[1] for ctx in (one, other)]
    probe = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    losses = [(engine(ctx) * probe).sum() for ctx in (one, other)]
    for _ in range(2):
        (gradient,) = torch.autograd.grad(losses[0], one, retain_graph=True)
        assert gradient.equal(alone[0])
    assert torch.autograd.grad(losses[1], other)[0].equal(alone[1])
    torch.autograd.grad(losses[0], one)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses[0], one)


def test_the_same_buffers_serve_every_step():
    engine, _ = encoders()
    ctx = context(2, 4).requires_grad_()
    held = set()
    for _ in range(5):
        loss = engine(ctx).square().sum()
        loss.backward()
        held.add(engine.tower.pooled_bytes)
        # `loss` lives on into the next step, as in every training loop.
    abandoned = engine(ctx).sum()
    assert engine.tower.pooled_bytes == 0
    del abandoned
    held.add(engine.tower.pooled_bytes)
    assert len(held) == 1 and min(held) > 0


def test_memory_of_many_graphs_is_let_go():
    engine, _ = encoders()
    ctx = context(2, 4).requires_grad_()
    engine(ctx).sum().backward()
    one = engine.tower.pooled_bytes
    graphs = [engine(ctx).sum() for _ in range(20)]
    del graphs
    assert engine.tower.pooled_bytes <= 2 * one


def test_a_shifted_context_is_the_sum_of_its_parts():
    """Features, and the gradients of both parts: a shift of each image, or of each of its rows."""
    engine, twin = encoders()
    for shape in ((3, 48), (3, 4, 48)):
        results = []
        for encoder in (engine, twin):
            generator = torch.Generator().manual_seed(3)
            vectors = torch.randn(4, 48, generator=generator).to(encoder.frozen.dtype).requires_grad_()
            shift = torch.randn(*shape, generator=generator).to(encoder.frozen.dtype).requires_grad_()
            features = encoder(ShiftedContext(vectors, shift))
            probe = torch.randn(features.shape, generator=generator).to(features)
            gradients = torch.autograd.grad((features * probe).sum(), (vectors, shift))
            results.append((features, *gradients))
        for name, actual, expected in zip(("features", "vectors", "shift"), *results, strict=True):
            assert_close(actual, expected, 2e-5, name)


def test_no_allocation_of_activation_size_after_the_first_step():
    engine, _ = encoders(paths=[[i % 7 + 1, i // 7 + 1] for i in range(300)])
    activation_bytes = 4 * 48 * engine.tree.rows
    results = 4 * 64 * 300  # the (B, K, E) features and their gradient are results, not activations
    assert activation_bytes > 1.5 * results
    assert largest_allocation_of_a_step(engine) <= 1.1 * results
    twin = TreeTextEncoder(small_clip(), engine.tree, backend="torch")
    assert largest_allocation_of_a_step(twin) > activation_bytes, "allocations would not be seen"


def largest_allocation_of_a_step(encoder):
    """In bytes, in the third step."""
    ctx = context(1, 4).requires_grad_()
    for _ in range(2):
        encoder(ctx).square().sum().backward()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        features = encoder(ctx)
        features.backward(torch.ones_like(features))
    return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


def test_the_same_bits_every_time():
    engine, _ = encoders()
    first = features_and_gradient(engine, context(3, 4))
    for _ in range(10):
        again = features_and_gradient(engine, context(3, 4))
        assert again[0].equal(first[0])
        assert again[1].equal(first[1])


def test_batch_size_may_change():
    engine, twin = encoders()
    for batch in (1, 3, 2, 3):
        compare(engine, twin, context(batch, 4))


def test_second_derivatives_are_refused():
    engine, _ = encoders()
    ctx = context(1, 4).requires_grad_()
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(engine(ctx).sum(), ctx, create_graph=True)


def test_changed_weights_and_types_are_noticed():
    engine, twin = encoders()
    ctx = context(2, 4)
    compare(engine, twin, ctx)
    model = small_clip(seed=1)
    tree = ClassTree(token_rows(PATHS, 4, 77), 4)
    encoder = TreeTextEncoder(model, tree)
    assert encoder.backend.name == "cpu"
    model.double()
    assert encoder(ctx.double()).dtype == torch.float64
    assert encoder.backend.name == "torch"


def test_an_explicit_backend_that_cannot_serve_is_refused():
    tree = ClassTree(token_rows(PATHS, 4, 77), 4)
    with pytest.raises(UserError, match=r"'cpu' cannot be used here: it does not compute in torch.float64"):
        TreeTextEncoder(small_clip(torch.float64), tree, backend="cpu")


def test_training_follows_the_twin():
    """200 steps of SGD in float32, engine against twin: the parameters stay together."""
    names = ["cat", "dog", "tabby cat", "digit zero", "digit one"]
    cfg = reference_cfg(ctx_init="a photo of a", n_ctx=4, precision="fp32", image_size=IMAGE_SIZE)
    model = tiny_clip(layers=2)
    trained = {}
    for backend in ("cpu", "torch"):
        torch.manual_seed(0)
        learner = CustomCLIP(cfg, names, model, backend=backend)
        optimizer = torch.optim.SGD(
            learner.prompt_learner.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(200):
            features = torch.randn(1, 64, generator=generator)
            label = torch.randint(5, (1,), generator=generator)
            optimizer.zero_grad()
            learner.forward_features(features, label).backward()
            optimizer.step()
        trained[backend] = [p.detach() for p in learner.prompt_learner.parameters()]
    for a, b in zip(trained["cpu"], trained["torch"], strict=True):
        assert_close(a, b, 1e-3)
