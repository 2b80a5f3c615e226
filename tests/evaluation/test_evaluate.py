"""Evaluation: order and batch size do not matter, and it is the model's own call that is measured."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import loaded_tiny_clip

from cocoop_fast.config import DataConfig, PromptConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.evaluation.evaluate import encode_test_images, evaluate, test_transform
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
