"""The two transforms against torchvision's own classes, and what their randomness depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from cocoop_fast.data.transforms import (
    Normalize,
    TestTransform,
    TrainTransform,
    order_generator,
    view_generator,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHAPES = [(64, 48), (8, 8), (31, 97), (300, 20), (20, 300)]  # the long ones need the centred fallback


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.8, 1.0), (1.0, 1.0)])
def test_train_transform_is_torchvisions(width, height, scale):
    ours = TrainTransform(32, scale, 0.5, Normalize(MEAN, STD))
    theirs = T.Compose(
        [
            T.RandomResizedCrop(32, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    image = picture(width, height)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(image)
        actual = ours(image, torch.Generator().manual_seed(seed))
        assert torch.equal(actual, expected), seed
        assert actual.shape == (3, 32, 32) and actual.dtype == torch.float32


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_test_transform_is_torchvisions(width, height):
    theirs = T.Compose(
        [
            T.Resize(32, interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(32),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    image = picture(width, height)
    assert torch.equal(TestTransform(32, Normalize(MEAN, STD))(image), theirs(image))


def test_flip_probability():
    transform = TrainTransform(8, (1.0, 1.0), 1.0, Normalize((0, 0, 0), (1, 1, 1)))
    plain = TrainTransform(8, (1.0, 1.0), 0.0, Normalize((0, 0, 0), (1, 1, 1)))
    image = picture(8, 8)
    generator = torch.Generator().manual_seed(0)
    flipped = transform(image, generator)
    assert torch.equal(flipped.flip(2), plain(image, generator.manual_seed(0)))


def test_views_depend_on_seed_epoch_and_sample_alone():
    draws = {
        key: torch.rand(1, generator=view_generator(*key)).item()
        for key in [(s, e, i) for s in range(5) for e in range(5) for i in range(20)]
    }
    assert len(set(draws.values())) == len(draws)  # no two streams alike
    torch.manual_seed(99)
    assert torch.rand(1, generator=view_generator(1, 2, 3)).item() == draws[1, 2, 3]
    orders = {
        tuple(torch.randperm(9, generator=order_generator(s, e)).tolist()) for s in range(4) for e in range(4)
    }
    assert len(orders) == 16
