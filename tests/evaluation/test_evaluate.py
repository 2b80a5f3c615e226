"""Evaluation: order and batch size do not matter, and it is the model's own call that is measured."""

from __future__ import annotations

import pytest
import torch
from stub_cuda import FakeGraphs
from tiny_runs import loaded_tiny_clip

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig, PromptConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.engine.graphs import WARM_UP_STEPS
from cocoop_fast.evaluation.evaluate import (
    WORTH_RECORDING,
    Features,
    encode_test_images,
    evaluate,
    test_transform,
)
from cocoop_fast.methods import build_model


@pytest.fixture(scope="module")
def digits():
    full = load_dataset(DataConfig())
    return full.with_splits(test=full.test[::12])


@pytest.mark.parametrize("method", ["cocoop", "coop", "zeroshot"])
def test_predictions_are_those_of_calls_on_single_images(digits, method):
    torch.manual_seed(0)
    clip = loaded_tiny_clip()
    model = build_model(PromptConfig(method=method), list(digits.classnames), clip)
    model.prompt_learner.train()
    features = encode_test_images(model, clip, digits, batch_size=7)
    assert features.image.shape == (45, 64) and features.label.tolist() == [s.label for s in digits.test]
    metrics = evaluate(model, features, 10, batch_size=7)
    assert not model.prompt_learner.training
    transform = test_transform(clip)
    with torch.no_grad():
        single = [int(model(transform(digits.read(s))[None]).argmax()) for s in digits.test]
    hits = sum(guess == sample.label for guess, sample in zip(single, digits.test, strict=True))
    assert (metrics.total, metrics.correct) == (45, hits)
    for label, guess in {(s.label, g) for s, g in zip(digits.test, single, strict=True)}:
        expected = sum((s.label, g) == (label, guess) for s, g in zip(digits.test, single, strict=True))
        assert metrics.confusion[label][guess] == expected


def test_batch_size_and_workers_change_nothing_but_rounding(digits):
    clip = loaded_tiny_clip()
    model = build_model(PromptConfig(), list(digits.classnames), clip)
    one = encode_test_images(model, clip, digits, batch_size=100)
    other = encode_test_images(model, clip, digits, batch_size=7, workers=1)
    assert torch.equal(one.label, other.label)
    torch.testing.assert_close(one.image, other.image, rtol=1e-5, atol=1e-5)


def test_progress(digits):
    clip = loaded_tiny_clip()
    model = build_model(PromptConfig(method="zeroshot"), list(digits.classnames), clip)
    seen = []
    features = encode_test_images(
        model, clip, digits, batch_size=20, progress=lambda *done: seen.append(done)
    )
    evaluate(model, features, 10, batch_size=30, progress=lambda *done: seen.append(done))
    assert seen == [(20, 45), (40, 45), (45, 45), (30, 45), (45, 45)]


def test_mixed_precision_agrees(digits):
    clip = loaded_tiny_clip()
    model = build_model(PromptConfig(), list(digits.classnames), clip)
    features = encode_test_images(model, clip, digits)
    model.prompt_learner.eval()
    with torch.no_grad():
        full = model.forward_features(features.image)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.forward_features(features.image)
    assert mixed.shape == full.shape
    torch.testing.assert_close(mixed.float(), full, rtol=0.1, atol=0.3)
    assert evaluate(model, features, 10, precision="amp").total == 45


# Batches recorded as a CUDA graph, by a recorder that runs on a CPU


def random_features(batches, extra=0):
    image = torch.randn(2 * batches + extra, 64, generator=torch.Generator().manual_seed(0))
    return Features(image, torch.arange(len(image)) % 10)


@pytest.mark.parametrize("method", ["cocoop", "coop"])
def test_recorded_batches_give_the_same(digits, method):
    """All but the first few and a smaller last one are replayed."""
    torch.manual_seed(0)
    model = build_model(PromptConfig(method=method), list(digits.classnames), loaded_tiny_clip())
    features, graphs = random_features(WORTH_RECORDING, extra=1), FakeGraphs()
    metrics = evaluate(model, features, 10, batch_size=2, record=graphs, on_message=pytest.fail)
    assert (graphs.recorded, graphs.replayed) == (1, WORTH_RECORDING - WARM_UP_STEPS)
    assert metrics.confusion == evaluate(model, features, 10, batch_size=2).confusion


def test_replays_do_not_hide_features_that_are_not_finite(digits):
    model = build_model(PromptConfig(), list(digits.classnames), loaded_tiny_clip())
    features = random_features(WORTH_RECORDING)
    features.image[-1, 0] = torch.nan
    model.check, checked = lambda image, label=None: None, model.check  # as in a replay
    model.check = lambda image, label=None: checked(image, label) if len(image) > 2 else None
    with pytest.raises(UserError, match=f"row {len(features.image) - 1}"):
        evaluate(model, features, 10, batch_size=2, record=FakeGraphs())


def test_what_cannot_or_need_not_be_recorded_is_not(digits):
    def forbidden(work):
        pytest.fail("it was recorded")

    clip, names = loaded_tiny_clip(), list(digits.classnames)
    few, many, messages = random_features(WORTH_RECORDING - 1), random_features(WORTH_RECORDING), []
    evaluate(build_model(PromptConfig(), names, clip), few, 10, batch_size=2, record=forbidden)
    evaluate(
        build_model(PromptConfig(method="zeroshot"), names, clip), many, 10, batch_size=2, record=forbidden
    )
    in_shards = build_model(PromptConfig(), names, clip)
    in_shards.tree_encoder.memory.shards = lambda tree: True
    evaluate(in_shards, many, 10, batch_size=2, record=forbidden, on_message=messages.append)
    [message] = messages
    assert message.startswith("Batches of an evaluation are not recorded") and "in shards" in message
