"""From an RGB image to the tensor that CLIP sees: the reference's two transforms, with their own randomness.

The reference draws crops from a worker's global generator, so that a run depends on the number of workers
and cannot be resumed exactly. Here each view of an image has a generator of its own, seeded from the run's
seed, the epoch and the sample alone; the draws themselves are torchvision's, in its order.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

_RATIO = (3.0 / 4.0, 4.0 / 3.0)
_ATTEMPTS = 10


def view_generator(seed: int, epoch: int, sample: int) -> torch.Generator:
    """The generator of one augmented view; nothing else enters, neither order nor worker nor time."""
    return torch.Generator().manual_seed(_mix("view", seed, epoch, sample))


def order_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of one epoch's order of samples."""
    return torch.Generator().manual_seed(_mix("order", seed, epoch))


def _mix(purpose: str, *numbers: int) -> int:
    """A 63-bit seed: nearby numbers give unrelated streams (a sum would make epoch 2 of seed 1 epoch 1 of 2)."""
    digest = hashlib.blake2b(f"{purpose}:{numbers}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Normalize:
    """Pixels of an image of the right size to (3, H, W) float32: ToTensor, then (x - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image) -> Tensor:
        return F.normalize(F.to_tensor(image), list(self.mean), list(self.std))


@dataclass(frozen=True)
class TrainTransform:
    """RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize, as the reference's.

    Args:
        size: pixels of a side of the result.
        scale: bounds of the crop's share of the image's area.
        flip: probability of a horizontal flip.
        normalize: the last step.
        interpolation: "bicubic", the reference's, or the model's own.
    """

    size: int
    scale: tuple[float, float]
    flip: float
    normalize: Normalize
    interpolation: str = "bicubic"

    def __call__(self, image: Image, generator: torch.Generator) -> Tensor:
        """RGB image to (3, size, size) float32."""
        top, left, height, width = _crop_box(image.width, image.height, self.scale, generator)
        size = [self.size, self.size]
        image = F.resized_crop(image, top, left, height, width, size, InterpolationMode(self.interpolation))
        if torch.rand(1, generator=generator).item() < self.flip:
            image = F.hflip(image)
        return self.normalize(image)


@dataclass(frozen=True)
class TestTransform:
    """Resize the smaller edge, CenterCrop, ToTensor, Normalize, as the reference's; or as the model's own.

    Args:
        size: pixels of a side of the result.
        normalize: the last step.
        resize_mode: "shortest", the reference's; "squash": the whole image, whatever its shape, without a crop.
        interpolation: "bicubic", the reference's, or "bilinear".
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    size: int
    normalize: Normalize
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"

    def __call__(self, image: Image) -> Tensor:
        """RGB image to (3, size, size) float32."""
        size = [self.size, self.size] if self.resize_mode == "squash" else [self.size]
        image = F.resize(image, size, InterpolationMode(self.interpolation))
        return self.normalize(F.center_crop(image, [self.size, self.size]))


def _crop_box(
    width: int, height: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop; torchvision's algorithm, on our own generator.

    An area share and an aspect ratio (log-uniform) are drawn until the box fits, ten times at most; then the
    largest centred box of an allowed ratio is taken.
    """
    log_ratio = torch.log(torch.tensor(_RATIO)).tolist()
    for _ in range(_ATTEMPTS):
        area = width * height * torch.empty(1).uniform_(*scale, generator=generator).item()
        ratio = torch.exp(torch.empty(1).uniform_(*log_ratio, generator=generator)).item()
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator).item())
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator).item())
            return top, left, h, w
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w
