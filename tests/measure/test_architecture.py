"""Architectures described without their weights."""

from __future__ import annotations

import dataclasses
import logging

import open_clip
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.errors import UserError
from cocoop_fast.measure.architecture import describe_model


def shapes_of(weights):
    """All that a plan reads of them."""
    tensors = tree_flatten(dataclasses.asdict(weights))[0]
    return [one.shape if isinstance(one, torch.Tensor) else one for one in tensors]


@pytest.mark.parametrize("name", ["RN50-quickgelu", "ViT-B-32-256", "PE-Core-S-16-384"])
def test_a_described_model_is_the_real_one(name):
    described = describe_model(name, torch.float32)
    real = open_clip.create_model(name, pretrained=None).requires_grad_(False)
    assert shapes_of(described.weights) == shapes_of(FrozenCLIP(real).text_weights())
    assert described.parameters == sum(parameter.numel() for parameter in real.parameters())
    # As plain products: not every torch counts its fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        size = FrozenCLIP(real).image_size
        real.visual(torch.zeros(1, 3, size, size))
    assert described.image_flops == counter.get_total_flops()
    assert described.image_launches > 10


def test_the_demo_model_is_described():
    assert len(describe_model("demo", torch.float32).weights.blocks) >= 2


def test_nothing_is_said_about_missing_weights(caplog):
    describe_model("ViT-B-32", torch.float32)
    assert caplog.text == ""
    assert not logging.root.manager.disable


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ViT-B-61", "'ViT-B-61' is not an open_clip architecture; did you mean"),
        ("ViT-B-16-SigLIP", "whose text tower is EOT-pooled"),
        ("roberta-ViT-B-32", "use a CLIP model of open_clip or OpenAI"),
    ],
)
def test_a_model_that_cannot_be_planned_for_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        describe_model(name, torch.float32)
