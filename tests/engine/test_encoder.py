"""TreeTextEncoder and TextEncoder against the dense computation."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_clip, tiny_openai_clip

from cocoop_fast import ClassTree, TextEncoder, TreeTextEncoder, UserError
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.reference import encode_prompts

NAMES = ["cat", "tabby cat", "tabby", "digit zero", "digit one", "digit zero zero", "x-ray", "cat"]


def dense_features(model, tokens, ctx):
    """(B, M, d) contexts to (B, K, E), one dense prompt at a time."""
    m = ctx.shape[1]
    embedding = model.token_embedding(tokens).to(ctx.dtype)
    per_image = []
    for context in ctx:
        prompts = torch.stack([torch.cat([e[:1], context, e[1 + m :]]) for e in embedding])
        per_image.append(encode_prompts(model, prompts, tokens))
    return torch.stack(per_image)


def setup(model, names=NAMES, n_ctx=4, batch=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = tokenize_prompts(names, n_ctx=n_ctx).tokens
        ctx = 0.5 * torch.randn(batch, n_ctx, model.ln_final.weight.shape[0], dtype=torch.float64)
    return tokens, ctx.to(model.ln_final.weight.dtype).requires_grad_()


@pytest.mark.filterwarnings("ignore:Classes with the same prompt")
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("n_ctx", [1, 4, 16])
def test_features_and_gradient_equal_the_dense_ones(layers, quick_gelu, n_ctx):
    model = tiny_clip(layers=layers, quick_gelu=quick_gelu, dtype=torch.float64)
    tokens, ctx = setup(model, n_ctx=n_ctx)
    encoder = TreeTextEncoder(model, ClassTree(tokens, n_ctx), backend="torch")
    features, expected = encoder(ctx), dense_features(model, tokens, ctx)
    assert_close(features, expected, 1e-12, "features")
    probe = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((features * probe).sum(), ctx)
    (expected_gradient,) = torch.autograd.grad((expected * probe).sum(), ctx)
    assert_close(gradient, expected_gradient, 1e-11, "gradient of ctx")


@pytest.mark.filterwarnings("ignore:Classes with the same prompt")
def test_openai_layout():
    model = tiny_openai_clip(dtype=torch.float64)
    tokens, ctx = setup(model)
    features = TreeTextEncoder(model, ClassTree(tokens, 4))(ctx)
    assert_close(features, dense_features(model, tokens, ctx), 1e-12)


@pytest.mark.filterwarnings("ignore:Classes with the same prompt")
def test_layer_scale():
    model = tiny_clip(ls_init_value=0.3, dtype=torch.float64)
    tokens, ctx = setup(model)
    features = TreeTextEncoder(model, ClassTree(tokens, 4))(ctx)
    assert_close(features, dense_features(model, tokens, ctx), 1e-12)


words = st.sampled_from(["cat", "dog", "tabby", "blue whale", "digit", "zero", "of", "x-ray", "photo", "42"])
names = st.lists(st.lists(words, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=60)


@pytest.mark.filterwarnings("ignore:Classes with the same prompt")
@settings(max_examples=15)
@given(names, st.integers(1, 16), st.integers(1, 3), st.booleans(), st.integers(0, 1000))
def test_random_class_lists(classnames, n_ctx, batch, quick_gelu, seed):
    model = MODELS[quick_gelu]
    tokens, ctx = setup(model, classnames, n_ctx, batch, seed)
    features = TreeTextEncoder(model, ClassTree(tokens, n_ctx), backend="torch")(ctx)
    assert_close(features, dense_features(model, tokens, ctx), 1e-12)


MODELS = {quick: tiny_clip(quick_gelu=quick, layers=2, dtype=torch.float64) for quick in (True, False)}


def test_gradients_off_gives_the_same_in_groups(monkeypatch):
    model = tiny_clip()
    tokens, ctx = setup(model, NAMES[:7], batch=5)
    encoder = TreeTextEncoder(model, ClassTree(tokens, 4))
    expected = encoder(ctx).detach()
    monkeypatch.setattr("cocoop_fast.engine.pieces.ROWS_PER_INFERENCE_PASS", {"cpu": 2 * encoder.tree.rows})
    with torch.no_grad():
        assert_close(encoder(ctx), expected, 1e-6)


def test_a_changed_weight_is_noticed():
    model = tiny_clip(dtype=torch.float64)
    tokens, ctx = setup(model, NAMES[:7])
    encoder = TreeTextEncoder(model, ClassTree(tokens, 4))
    encoder(ctx)
    with torch.no_grad():
        model.token_embedding.weight.mul_(2)
        model.transformer.resblocks[0].attn.in_proj_weight.mul_(0.5)
    assert_close(encoder(ctx), dense_features(model, tokens, ctx), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_the_dense_computation(dtype):
    exact_model = tiny_clip(dtype=torch.float64)
    tokens, ctx = setup(exact_model, NAMES[:7])
    exact = dense_features(exact_model, tokens, ctx)
    model = tiny_clip(dtype=dtype)
    dense_error = (dense_features(model, tokens, ctx.to(dtype)).double() - exact).norm()
    tree_error = (TreeTextEncoder(model, ClassTree(tokens, 4))(ctx.to(dtype)).double() - exact).norm()
    assert tree_error <= 1.5 * dense_error


def test_dense_text_encoder_reads_up_to_the_last_eot():
    model = tiny_clip(dtype=torch.float64)
    tokens, _ = setup(model, NAMES[:7])
    prompts = torch.randn(7, 77, 48, dtype=torch.float64, requires_grad=True)
    encoder = TextEncoder(model)
    features, expected = encoder(prompts, tokens), encode_prompts(model, prompts, tokens)
    assert_close(features, expected, 1e-12)
    (gradient,) = torch.autograd.grad(features.square().sum(), prompts)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), prompts)
    assert_close(gradient, expected_gradient, 1e-11)
    assert encoder.dtype == torch.float64


@pytest.mark.parametrize(
    "ctx", [torch.zeros(2, 4, 47), torch.zeros(2, 3, 48), torch.zeros(48), torch.zeros(2, 4, 48).long()]
)
def test_wrong_contexts_are_refused(ctx):
    model = tiny_clip()
    tokens, _ = setup(model, NAMES[:3])
    with pytest.raises(UserError, match=r"`ctx` must be a floating-point \(M, d\) or \(B, M, d\) tensor"):
        TreeTextEncoder(model, ClassTree(tokens, 4))(ctx)


def test_wrong_trees_and_backends_are_refused():
    model = tiny_clip(context_length=8)
    tokens, _ = setup(model, ["a rather long name of a class"])
    with pytest.raises(UserError, match="reads 8"):
        TreeTextEncoder(model, ClassTree(tokens, 4))
    model = tiny_clip(vocab_size=100)
    with pytest.raises(UserError, match="knows 100 tokens"):
        TreeTextEncoder(model, ClassTree(setup(model, ["cat"])[0], 4))
    model = tiny_clip()
    tokens, _ = setup(model, ["cat"])
    with pytest.raises(UserError, match="backend 'magic' is not part"):
        TreeTextEncoder(model, ClassTree(tokens, 4), backend="magic")


def test_wrong_prompts_are_refused():
    with pytest.raises(UserError, match=r"`prompts` must be \(n, L, d\)"):
        TextEncoder(tiny_clip())(torch.zeros(2, 77, 48), torch.zeros(3, 77, dtype=torch.int64))
