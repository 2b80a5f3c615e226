"""Nearest words and principal components, against the obvious ways to compute them."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import loaded_tiny_clip

from cocoop_fast.clip.tokenizer import tokenizer, word_of
from cocoop_fast.config import PromptConfig
from cocoop_fast.methods import build_model
from cocoop_fast.report.contexts import nearest_words, principal_components, shifts_of

NAMES = ("cat", "red fox")


@pytest.fixture(scope="module")
def clip():
    return loaded_tiny_clip()


def test_a_context_that_is_words_is_nearest_to_them(clip):
    model = build_model(PromptConfig(method="coop", ctx_init="a photo of a"), NAMES, clip)
    found = nearest_words(model.prompt_learner.ctx, clip, NAMES[0])
    assert [token.nearest[0] for token in found] == [("a", 0.0), ("photo", 0.0), ("of", 0.0), ("a", 0.0)]
    assert [token.place for token in found] == ["1", "2", "3", "4"]


def test_distances_are_those_of_the_embedding(clip):
    table = clip.model.token_embedding.weight.double()
    vector = torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(1))
    (found,) = nearest_words(vector, clip, NAMES[0], count=7)
    distance = (table - vector.double()).square().sum(dim=1).sqrt()
    expected = distance.argsort()[:7].tolist()
    assert [word for word, _ in found.nearest] == [word_of(token) for token in expected]
    for (_, value), token in zip(found.nearest, expected, strict=True):
        assert value == pytest.approx(float(distance[token]), rel=1e-5)
    assert found.typical == pytest.approx(float(distance.mean()), rel=1e-5)
    assert found.length == pytest.approx(float(vector.norm()), rel=1e-6)


def test_only_words_that_the_model_was_trained_on_are_named(clip):
    from dataclasses import replace

    known = replace(clip, known_tokens=frozenset(tokenizer().encode("dog tree")))
    (found,) = nearest_words(torch.zeros(1, 48), known, NAMES[0])
    assert {word for word, _ in found.nearest} == {"dog", "tree"}


def test_class_specific_contexts_name_their_class(clip):
    model = build_model(PromptConfig(method="coop", csc=True, ctx_init="", n_ctx=2), NAMES, clip)
    found = nearest_words(model.prompt_learner.ctx, clip, NAMES[0])
    assert [token.place for token in found] == ["cat, 1", "cat, 2"]


def test_pieces_of_words_are_marked():
    whole, piece = tokenizer().encode("cat")[0], tokenizer().encode("catzqj")[0]
    assert word_of(whole) == "cat" and word_of(piece).endswith("-")


@pytest.mark.parametrize("method", ["cocoop", "meta-nets"])
def test_shifts_are_the_meta_net_s_output(clip, method):
    model = build_model(PromptConfig(method=method), NAMES, clip)
    learner = model.prompt_learner
    image = torch.randn(9, model.embed_dim, generator=torch.Generator().manual_seed(2))
    label = torch.arange(9) % 2
    shifts = shifts_of(learner, image, label, NAMES, 2)
    unit = image / image.norm(dim=1, keepdim=True)
    nets = [learner.meta_net] * 4 if method == "cocoop" else learner.meta_nets
    with torch.no_grad():
        bias = torch.stack([net(unit) for net in nets], dim=1).double()
    torch.testing.assert_close(shifts.mean, bias.mean(dim=0), atol=1e-6, rtol=0)
    flat = (bias - bias.mean(dim=0)).flatten(1)
    spread = flat.square().sum(dim=1).mean().sqrt() / 2  # 4 tokens
    assert shifts.spread == pytest.approx(float(spread), rel=1e-5)
    points, explained = principal_components(bias.flatten(1))
    torch.testing.assert_close(shifts.points, points, atol=1e-5, rtol=0)
    assert shifts.explained == pytest.approx(explained, abs=1e-5)


def test_a_context_for_all_images_has_no_shifts(clip):
    model = build_model(PromptConfig(method="coop"), NAMES, clip)
    assert (
        shifts_of(model.prompt_learner, torch.randn(5, model.embed_dim), torch.zeros(5).long(), NAMES, 2)
        is None
    )


def test_components_are_those_of_the_covariance():
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x *= torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    points, explained = principal_components(x)
    centred = x - x.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    expected = centred @ vectors[:, [-1, -2]]
    torch.testing.assert_close(points.abs(), expected.abs(), atol=1e-10, rtol=0)
    assert explained == pytest.approx((values[[-1, -2]] / values.sum()).tolist(), abs=1e-12)


def test_points_that_do_not_differ_stay_at_the_origin():
    points, explained = principal_components(torch.ones(4, 5, dtype=torch.float64))
    assert not points.any() and explained == (0.0, 0.0)
