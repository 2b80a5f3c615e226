"""Training without files: patches of colour, a CLIP with random weights, and an observer that remembers."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from tiny_models import tiny_clip
from tiny_runs import loaded_tiny_clip
from torch import nn

from cocoop_fast.config import Method, PromptConfig, ResolvedOptim
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


def recipe(**fields: Any) -> ResolvedOptim:
    """One epoch of the paper's recipe if nothing else is said."""
    return ResolvedOptim(**{"epochs": 1, "batch_size": 1, **fields})


class Wrapped(nn.Module):
    """A model that does something to the loss of each step, as ``compute(loss_and_logits, features, label)`` says."""

    def __init__(self, model: nn.Module, compute: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.model, self.compute = model, compute
        self.prompt_learner, self.image_encoder = model.prompt_learner, model.image_encoder
        self.dtype = model.dtype
        self.lower_memory = model.lower_memory

    def loss_and_logits(
        self, features: torch.Tensor, label: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.compute(self.model.loss_and_logits, features, label)


def broken(model: nn.Module, steps: Container[int], where: str = "loss", value: float = math.nan) -> Wrapped:
    """The model, but the loss, or a gradient, of some 1-based steps is not finite."""
    numbers = count(1)

    def compute(loss_and_logits, features, label):
        loss, logits = loss_and_logits(features, label)
        if next(numbers) in steps:
            if where == "loss":
                return loss + value, logits
            loss.register_hook(lambda gradient: gradient * value)
        return loss, logits

    return Wrapped(model, compute)


def replayed_by_running(work):
    """Records a step as a GPU does: its result has its memory now, and its content after each replay."""
    result = work()

    def replay():
        fresh = work()
        result.report.copy_(fresh.report)
        for memory, value in zip(result.gradients, fresh.gradients, strict=True):
            memory.copy_(value)

    return result, replay


def run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, error: Exception, times: int
) -> None:
    """Let towers of the model's kind fail so many times, wherever they go backward."""
    kind = type(model.tree_encoder.tower)
    encode, left = kind.encode, [times]

    def failing(self, ctx, *rest):
        if ctx.requires_grad and left[0]:
            left[0] -= 1
            raise error
        return encode(self, ctx, *rest)

    monkeypatch.setattr(kind, "encode", failing)


class Recorder(Observer):
    def __init__(self):
        self.steps, self.epochs, self.calls, self.messages = [], [], [], []

    def on_message(self, text):
        self.messages.append(text)

    def on_epoch_start(self, epoch, epochs, first_batch, batches):
        self.calls.append((epoch, epochs, first_batch, batches))

    def on_step(self, info):
        self.steps.append(info)

    def on_epoch_end(self, info):
        self.epochs.append(info)
