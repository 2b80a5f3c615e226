"""PromptLearner: the reference's attributes, state-dict keys and output."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from tiny_models import IMAGE_SIZE, tiny_clip, tiny_openai_clip

from cocoop_fast import PromptLearner, UserError
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.prompts.tokens import tokenize_names

NAMES = ["tabby_cat", "digit zero", "dog"]


def cfg(ctx_init="a photo of a", n_ctx=4, precision="fp32", image_size=IMAGE_SIZE):
    return reference_cfg(ctx_init=ctx_init, n_ctx=n_ctx, precision=precision, image_size=image_size)


@pytest.mark.parametrize("model", [tiny_clip(), tiny_openai_clip()])
def test_attributes_and_state_dict_of_the_reference(model):
    learner = PromptLearner(cfg(), NAMES, model)
    shapes = {key: tuple(value.shape) for key, value in learner.state_dict().items()}
    assert shapes == {
        "ctx": (4, 48),
        "token_prefix": (3, 1, 48),
        "token_suffix": (3, 72, 48),
        "meta_net.linear1.weight": (4, 64),
        "meta_net.linear1.bias": (4,),
        "meta_net.linear2.weight": (48, 4),
        "meta_net.linear2.bias": (48,),
    }
    assert {name for name, _ in learner.named_parameters()} == {k for k in shapes if "token" not in k}
    assert (learner.n_cls, learner.n_ctx, learner.name_lens) == (3, 4, [2, 2, 1])
    assert learner.tokenized_prompts.shape == (3, 77)


def test_output_is_prefix_context_suffix():
    model = tiny_clip(dtype=torch.float64)
    learner = PromptLearner(cfg(), NAMES, model)
    features = torch.randn(2, 64, dtype=torch.float64)
    prompts = learner(features)
    assert prompts.shape == (2, 3, 77, 48)
    embedding = model.token_embedding(learner.tokenized_prompts)
    assert prompts[1, :, :1].equal(embedding[:, :1])
    assert prompts[0, :, 5:].equal(embedding[:, 5:])
    for b in range(2):
        expected = learner.ctx + learner.meta_net(features[b])
        for k in range(3):
            assert_close(prompts[b, k, 1:5], expected, 1e-12)


def test_context_starts_at_the_words():
    model = tiny_clip()
    learner = PromptLearner(cfg(ctx_init="a_photo of a"), NAMES, model)
    words = model.token_embedding(tokenize_names(["a photo of a"], before="", after=""))[0, 1:5]
    assert learner.ctx.equal(words)


def test_context_has_one_vector_a_token():
    learner = PromptLearner(cfg(ctx_init="an antidisestablishmentarianism of"), NAMES, tiny_clip())
    assert learner.n_ctx > 3
    assert (
        learner.tokenized_prompts.argmax(dim=1) == learner.n_ctx + torch.tensor(learner.name_lens) + 2
    ).all()


def test_random_context():
    torch.manual_seed(0)
    learner = PromptLearner(cfg(ctx_init="", n_ctx=16), NAMES, tiny_clip())
    assert learner.ctx.shape == (16, 48)
    assert 0.015 < learner.ctx.std() < 0.025


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision(precision, dtype):
    """Float32 master copies over a low-precision model; the reference's all-float16 state dict loads into them."""
    learner = PromptLearner(cfg(precision=precision), NAMES, tiny_clip(dtype=dtype))
    assert {p.dtype for p in learner.parameters()} == {torch.float32}
    features = torch.randn(1, 64, dtype=dtype)
    assert learner(features).dtype == dtype
    contexts = learner.contexts(features)
    assert {contexts.vectors.dtype, contexts.shift.dtype} == {torch.float32}
    low = {name: torch.randn_like(value).to(dtype) for name, value in learner.state_dict().items()}
    learner.load_state_dict(low)
    assert all(p.dtype == torch.float32 and p.equal(low[n].float()) for n, p in learner.named_parameters())


def test_the_model_is_left_alone():
    model = tiny_clip()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learner = PromptLearner(cfg(), NAMES, model)
    with torch.no_grad():
        learner.ctx.add_(1)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "non-empty list"),
        ("cat", {}, "non-empty list"),
        (["cat", "  "], {}, "Class 1 has an empty name"),
        (["cat", "_"], {}, "Class 1 has an empty name"),
        (
            ["very " * 80],
            {},
            r"prompt of class 0, 'very very.*', has 87 tokens \(80 of them its name\).* reads 77",
        ),
        (["cat"], {"ctx_init": "", "n_ctx": 0}, "at least 1, got 0"),
        (["cat"], {"ctx_init": "", "n_ctx": 80}, "reads 77"),
        (["cat"], {"image_size": 224}, "cfg.INPUT.SIZE is 224 pixels, but the image tower expects 32"),
    ],
)
def test_errors(names, options, message):
    with pytest.raises(UserError, match=message):
        PromptLearner(cfg(**options), names, tiny_clip())


def test_features_narrower_than_the_meta_net_are_refused():
    with pytest.raises(UserError, match="at least 16 dimensions, this model has 8"):
        PromptLearner(cfg(), NAMES, tiny_clip(embed_dim=8))
