"""Training without files: patches of colour, a CLIP with random weights, and an observer that remembers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from tiny_models import tiny_clip
from tiny_runs import loaded_tiny_clip
from torch import nn

from cocoop_fast.config import Method, PromptConfig
from cocoop_fast.data import Dataset, Sample
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.data.transforms import Normalize, TrainTransform
from cocoop_fast.methods import build_model
from cocoop_fast.training.observer import Observer

COLOURS = {"red": (220, 30, 30), "dark green": (20, 110, 20), "sky blue": (110, 180, 250)}
NAMES = tuple(COLOURS)


def paint(sample: Sample) -> Image.Image:
    """A patch of the class's colour, with a gradient that makes crops differ."""
    ramp = np.linspace(0.6, 1.0, 16)[:, None, None] * np.linspace(0.8, 1.0, 20)[None, :, None]
    return Image.fromarray(
        (ramp * np.array(COLOURS[sample.classname]) * (1 - sample.source / 400)).astype(np.uint8)
    )


def make_batches(images: int, batch_size: int) -> TrainBatches:
    """``images`` in all, classes in turn: easy enough for a random CLIP to learn from."""
    samples = tuple(Sample(i, i % 3, NAMES[i % 3]) for i in range(images))
    data = Dataset("colours", NAMES, samples, (), samples, paint, where="memory")
    transform = TrainTransform(32, (0.5, 1.0), 0.5, Normalize((0.5,) * 3, (0.5,) * 3))
    return TrainBatches(data, samples, transform, batch_size, seed=1)


def clip_model(dtype: torch.dtype = torch.float32) -> CLIP:
    model = tiny_clip(layers=2, dtype=dtype)
    model.logit_scale.data.fill_(4.6)  # CLIP's own: exp(4.6) = 100
    return model


def fast_model(method: Method = "cocoop", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    clip = replace(loaded_tiny_clip(), model=clip_model(dtype))
    return build_model(PromptConfig(method=method), list(NAMES), clip)


def large_model() -> nn.Module:
    """Twelve layers and twenty classes: pieces can be made smaller for a while."""
    names = [
        f"{a} {b}" for a in ("red", "green", "blue", "big", "small") for b in ["car", "house", "tree", "dog"]
    ]
    clip = replace(loaded_tiny_clip(), model=tiny_clip(layers=12))
    torch.manual_seed(1)
    return build_model(PromptConfig(), names, clip)


def run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, error: Exception, times: int
) -> None:
    """Let towers of the model's kind fail so many times, wherever they go backward."""
    kind = type(model.tree_encoder._current_tower(deep=False))
    encode, left = kind.encode, [times]

    def failing(self, ctx, *rest):
        if ctx.requires_grad and left[0]:
            left[0] -= 1
            raise error
        return encode(self, ctx, *rest)

    monkeypatch.setattr(kind, "encode", failing)


class Recorder(Observer):
    def __init__(self):
        self.steps, self.epochs, self.calls = [], [], []

    def on_epoch_start(self, epoch, epochs, first_batch, batches):
        self.calls.append((epoch, epochs, first_batch, batches))

    def on_step(self, info):
        self.steps.append(info)

    def on_epoch_end(self, info):
        self.epochs.append(info)
