"""The fused tower with Triton's kernels against the torch tower in float64: features, gradients, memory, launches."""

from __future__ import annotations

import pytest
import torch
from attention_cases import tree_of
from comparison import assert_close
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import CustomCLIP, TreeTextEncoder, UserError
from cocoop_fast.engine.constants import compute_constants
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.memory import PeakBytes
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.ops.table import BACKENDS, select_backend

pytest.importorskip("triton.runtime.interpreter")

from launches import Launches

from cocoop_fast.kernels import rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TWIN = {"vocab_size": 1000, "width": 32, "heads": 2, "embed_dim": 24}
NAMES = [[5, 3], [1, 2], [1], [1, 2, 4], [5, 3]]


def encoders(names=NAMES, n_ctx=2, dtype=torch.float32, **options):
    """The engine in this type, its twin in float64 with the same weights."""
    tree = tree_of(names, n_ctx)
    model = tiny_clip(dtype=dtype, **{**TWIN, **options}).to(DEVICE)
    twin = tiny_clip(dtype=dtype, **{**TWIN, **options}).double()
    return TreeTextEncoder(model, tree, backend="triton"), TreeTextEncoder(twin, tree, backend="torch")


def context(batch, n_ctx=2, width=32, seed=0):
    return 0.5 * torch.randn(batch, n_ctx, width, generator=torch.Generator().manual_seed(seed))


def features_and_gradient(encoder, ctx):
    ctx = ctx.detach().clone().requires_grad_()
    features = encoder(ctx)
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
    (gradient,) = torch.autograd.grad((features * probe).sum(), ctx)
    return features.detach(), gradient


def compare(engine, twin, ctx, tolerance):
    features, gradient = features_and_gradient(engine, ctx.to(DEVICE))
    expected_features, expected_gradient = features_and_gradient(twin, ctx.double())
    assert_close(features.cpu(), expected_features, tolerance, "features")
    assert_close(gradient.cpu(), expected_gradient, 2 * tolerance, "gradient of ctx")
    assert gradient.dtype == ctx.dtype


@pytest.mark.parametrize(
    "layers, n_ctx, batch, quick_gelu", [(1, 3, 2, True), (2, 1, 1, False), (3, 2, 3, True)]
)
def test_equals_the_twin(layers, n_ctx, batch, quick_gelu):
    engine, twin = encoders(n_ctx=n_ctx, layers=layers, quick_gelu=quick_gelu)
    compare(engine, twin, context(batch, n_ctx), 1e-5)


@pytest.mark.parametrize("layers, dtype, tolerance", [(3, torch.float32, 2e-5), (2, torch.float16, 1e-2)])
def test_deep_prompts(layers, dtype, tolerance):
    """Of the second layer alone, in the first case; of the last one, in the second, from float32 master copies."""
    both = encoders([[1], [2]], layers=layers, dtype=dtype, heads=1, width=24)
    results = []
    for encoder, device, wide in zip(both, (DEVICE, "cpu"), (torch.float32, torch.float64), strict=True):
        rows = [context(2, width=24, seed=seed).to(device, wide).requires_grad_() for seed in range(2)]
        features = encoder(rows[0], rows[1:])
        probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
        results.append([features, *torch.autograd.grad((features * probe).sum(), rows)])
    for layer, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(actual.cpu(), expected, tolerance, f"result {layer}")


def test_trees_of_several_tiles():
    engine, twin = encoders([[1, k] for k in range(2, 20)] + [[3] * 9], layers=2, heads=1, width=24)
    compare(engine, twin, context(1, width=24), 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision(dtype, tolerance):
    """Contexts are float32 master copies; a number has 11 bits in float16, 8 in bfloat16."""
    engine, twin = encoders(dtype=dtype, layers=2)
    compare(engine, twin, context(2), tolerance)
    assert engine(context(1).to(DEVICE)).dtype == dtype


def test_float16_rows_with_the_layer_norms_of_openai_in_float32():
    engine, twin = encoders(dtype=torch.float16, layers=2)
    for module in engine.frozen._text.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    compare(engine, twin, context(1), 5e-3)


def test_without_gradients():
    engine, twin = encoders(layers=2)
    expected = twin(context(2).double())
    for _ in range(2):  # the second pass is over the first one's memory
        with torch.no_grad():
            assert_close(engine(context(2).to(DEVICE)).cpu(), expected, 1e-5)
    training = engine.tower.pass_size([engine.tree], 2, keeps=True).total
    assert 0 < engine.tower.pooled_bytes < training, "memory for backward was borrowed in vain"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_pass_allocates_what_the_tower_says(batch):
    said = encoders(layers=2)[0].tower.pass_size([encoders(layers=2)[0].tree], batch, keeps=True).total
    engine, _ = encoders(layers=2)
    ctx = context(batch).to(DEVICE).requires_grad_()
    with PeakBytes() as peak:
        features = engine(ctx)
        features.backward(torch.ones_like(features))
    fixed = 3 * features.nbytes  # the features of the classes, their gradient and that of the leaves
    # Absolute: a GPU also gets the indices of the tree, which lie on the CPU already.
    assert said + fixed == pytest.approx(peak.bytes, rel=0.02, abs=0 if DEVICE.type == "cpu" else 2048)


def test_batch_size_may_change():
    engine, twin = encoders(layers=2)
    for batch in (2, 1, 2):
        compare(engine, twin, context(batch, seed=batch), 1e-5)
        if batch == 2:
            held = engine.tower.pooled_bytes
        assert engine.tower.pooled_bytes == held


def test_towers_of_two_trees_share_their_memory():
    engine, twin = encoders(layers=1)
    other, other_twin = encoders([[9], [8, 7]], layers=1)
    weights = engine.frozen.text_weights()
    other.frozen = engine.frozen
    other._tower = engine.tower.for_part(compute_constants(weights, other.tree))
    for _ in range(2):
        compare(engine, twin, context(2), 1e-5)
        held = engine.tower.pooled_bytes
        compare(other, other_twin, context(2), 1e-5)
        assert engine.tower.pooled_bytes == other.tower.pooled_bytes == held


def test_two_graphs_at_once_and_a_graph_used_twice():
    engine, _ = encoders([[1], [2]], layers=2, heads=1)
    one, other = (context(1, seed=seed).to(DEVICE).requires_grad_() for seed in (1, 2))
    alone = [features_and_gradient(engine, ctx)[1] for ctx in (one, other)]
    probe = torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    losses = [(engine(ctx) * probe).sum() for ctx in (one, other)]
    for _ in range(2):
        (gradient,) = torch.autograd.grad(losses[0], one, retain_graph=True)
        assert gradient.equal(alone[0])
    assert torch.autograd.grad(losses[1], other)[0].equal(alone[1])
    torch.autograd.grad(losses[0], one)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses[0], one)


def test_a_recorded_pass_has_memory_of_its_own(monkeypatch):
    """A graph writes into its memory at every replay: no other pass may have it, nor may it have another's."""
    engine, _ = encoders(layers=1)
    features_and_gradient(engine, context(1).to(DEVICE))
    pooled = engine.tower.pooled_bytes
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_available", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        recorded = engine(context(1).to(DEVICE).requires_grad_())
    assert engine.tower.pooled_bytes == pooled
    del recorded
    assert engine.tower.pooled_bytes == pooled


def test_second_derivatives_are_refused():
    engine, _ = encoders(layers=1)
    ctx = context(1).to(DEVICE).requires_grad_()
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(engine(ctx).sum(), ctx, create_graph=True)


def test_autocast_ends_at_the_door():
    engine, _ = encoders(layers=1)
    ctx = context(1).to(DEVICE)
    features, gradient = features_and_gradient(engine, ctx)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        again = features_and_gradient(engine, ctx)
    assert again[0].equal(features)
    assert again[1].equal(gradient)


# Launches


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter")
@pytest.mark.parametrize("layers", [2, 3])
def test_launches(monkeypatch, layers):
    """8 a layer forward and at most 9 backward, and 6 each that come once: exactly these, no copy beside them, and no
    addition of contexts: the shared vectors, each image's shift and the positions are summed in one kernel."""
    engine, _ = encoders([[k, 1] for k in range(2, 10)], layers=layers, heads=1)
    parts = torch.randn(2, 32).requires_grad_(), torch.randn(1, 32).requires_grad_()
    contexts = ContextRows(*parts)
    tower = engine.tower
    tower.encode(contexts).sum().backward()  # the first pass lays the memory out
    with Launches(monkeypatch, run=True) as forward:
        features = tower.encode(contexts)
    # Layer 0's rows; the EOT rows of the last.
    once = {"_assemble_prompts_fwd_kernel": 1, "_move_rows_kernel": 1}
    of_layers = {
        "_layer_norm_fwd_kernel": 2 * layers + 1,
        "tree_attention_fwd_kernel": layers,
        "_activation_fwd_kernel": layers,
        "mm": 2 * layers,
        "addmm": 2 * layers + 2,  # with the bias; also the EOT rows' queries, and the projection
    }
    assert forward.count() == of_layers | once
    assert forward.count().total() == 8 * layers + 5

    grad = torch.ones_like(features)
    monkeypatch.undo()
    with Launches(monkeypatch, run=True) as backward:
        torch.autograd.grad(features, parts, grad)
    assert len(tower.attention.plan.summed_row), "the rows should fill more than one tile"
    summed = layers - (len(tower.leaf_attention.plan.summed_row) == 0)
    of_layers = {
        "_layer_norm_bwd_kernel": 2 * layers + 2,
        "tree_attention_bwd_kernel": layers,
        "sum_partials_kernel": summed,
        "_activation_bwd_kernel": layers,
        "mm": 4 * layers + 2,
    }
    once = {"_assemble_prompts_bwd_kernel": 1, "_move_rows_kernel": 1}  # sums to both parts; the EOT rows
    assert backward.count() == of_layers | once
    assert backward.count().total() <= 9 * layers + 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter")
@pytest.mark.parametrize("names, copies", [([[4], [2], [3]], 1), (NAMES, 3)], ids=["distinct", "two alike"])
def test_features_of_the_classes_are_moved_and_nothing_is_sorted(monkeypatch, names, copies):
    """One launch each way; two more in backward for second classes of a prompt."""
    engine, _ = encoders(names, layers=2, heads=1)
    ctx = torch.randn(1, 2, 32).requires_grad_()
    leaves = engine.tower.encode(ContextRows(None, ctx))
    with Launches(monkeypatch, run=True) as forward:
        engine(ctx)
    assert forward.count()["_move_rows_kernel"] == 2 and not forward.count()["index"]  # the EOT rows before
    monkeypatch.undo()
    class_rows = engine.tower.constants.classes
    classes = class_rows(leaves, engine.tower.ops)
    assert len(class_rows.turns) == (copies + 1) / 2  # worked out once
    gradient = torch.ones_like(classes)
    with Launches(monkeypatch, run=True) as backward:
        torch.autograd.grad(classes, leaves, gradient)
    assert backward.count() == {"_move_rows_kernel": copies}


# Arguments are looked at once a shape


def test_arguments_are_checked_in_the_first_pass_of_a_shape_alone(monkeypatch):
    """What a launcher asks of a tensor's device is asked of every tensor that it checks."""
    model = tiny_clip(**TWIN | {"layers": 2, "heads": 1}).to(DEVICE)
    tower, looked_at = TreeTextEncoder(model, tree_of(NAMES, 2), backend="triton").tower, []
    monkeypatch.setattr(rows, "_check_device", lambda name, *tensors: looked_at.append(name))

    def looks(*contexts):
        looked_at.clear()
        tower.encode(ContextRows(*contexts)).sum().backward()
        return len(looked_at)

    one, two = (torch.zeros(batch, 32, device=DEVICE, requires_grad=True) for batch in (1, 2))
    vectors = torch.zeros(2, 32, device=DEVICE, requires_grad=True)
    first = looks(vectors, one)
    assert first > 40 and looks(vectors, one) == 0
    assert looks(vectors, two) == first and looks(vectors, two) == 0  # another batch
    assert looks(None, vectors[None].detach().expand(2, -1, -1).clone().requires_grad_()) > 0
    assert looks(vectors.detach().half().requires_grad_(), two) == first  # another type
    with pytest.raises(ValueError, match="must have shape"):
        tower.ops.gather_rows(one, torch.zeros(1, dtype=torch.int64), one)


# The whole model, and the choice of the backend


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("fp16", 1e-2)])
def test_model(precision, tolerance):
    dtype = torch.float32 if precision == "fp32" else torch.float16
    cfg = reference_cfg(ctx_init="", n_ctx=2, precision=precision, image_size=IMAGE_SIZE)
    options = {"layers": 2, "width": 32, "heads": 2, "embed_dim": 24}
    features = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([2, 0])
    results = []
    for backend, model_type, device in (("triton", dtype, DEVICE), ("torch", torch.float64, "cpu")):
        torch.manual_seed(0)
        clip = tiny_clip(dtype=dtype, **options).to(device, model_type)
        model = CustomCLIP(cfg, ["cat", "dog", "tabby cat"], clip, backend=backend).to(device)
        loss = model.forward_features(features.to(device), label.to(device))
        loss.backward()
        learned = dict(model.prompt_learner.named_parameters())
        results.append((loss, {name: one.grad for name, one in learned.items()}))
    (loss, gradients), (expected_loss, expected_gradients) = results
    assert loss.dtype == torch.float32, "a float16 loss could not be scaled"
    assert_close(loss.cpu(), expected_loss, tolerance, "loss")
    for name, expected in expected_gradients.items():
        assert_close(gradients[name].cpu(), expected, 2 * tolerance, name)


def test_the_interpreter_serves_only_who_names_it():
    (triton,) = (backend for backend in BACKENDS if backend.name == "triton")
    half = torch.float16
    assert triton.refusal(torch.device("cuda"), half) is None
    assert triton.refusal(torch.device("cuda"), torch.float64) == "it does not compute in torch.float64"
    if DEVICE.type == "cpu":
        assert select_backend(DEVICE, half, "triton") is triton
        assert select_backend(DEVICE, half).name == "torch"
