"""Whole runs on a tiny CLIP with random weights: what tests of training and evaluation share."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.config import DataConfig, ModelConfig, RunConfig, from_mapping
from cocoop_fast.data import Dataset, load_dataset
from cocoop_fast.data.split_names import split_of
from cocoop_fast.experiments import shared
from cocoop_fast.runs.directory import read_run
from cocoop_fast.training.observer import Observer


def loaded_tiny_clip(config: ModelConfig | None = None) -> LoadedClip:
    """Stands in for ``load_clip``."""
    amp = config is not None and config.precision == "amp"
    return LoadedClip(
        model=tiny_clip(layers=2),
        name="tiny",
        image_size=IMAGE_SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        device=torch.device("cpu"),
        precision="amp" if amp else "fp32",
    )


def load_few_test_images(config: DataConfig) -> Dataset:
    """Stands in for ``load_dataset``: 54 test images of digits are enough to tell runs apart."""
    dataset = load_dataset(config)
    return dataset.with_splits(test=dataset.test[::10]) if config.name == "digits" else dataset


def use_tiny_clip(monkeypatch: Any) -> None:
    """Let everything load the tiny CLIP, and test on few images."""
    monkeypatch.setattr(shared, "load_clip", loaded_tiny_clip)
    monkeypatch.setattr(shared, "load_dataset", load_few_test_images)


def tiny_config(output_dir: Path, **fields: Any) -> RunConfig:
    """Digits, two shots, two epochs of ten steps; ``optim__epochs=3`` sets ``optim.epochs``."""
    values: dict[str, Any] = {"data": {"shots": 2}, "optim": {"epochs": 2}, "output_dir": str(output_dir)}
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[field] = value
    return from_mapping(values)


class StopAfter(Observer):
    """Interrupts a run after so many steps of this process, as Ctrl-C would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step(self, info: Any) -> None:
        self.steps -= 1
        if self.steps == 0:
            raise KeyboardInterrupt


class At(Observer):
    """Does something after one step, and remembers what was said."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action, self.messages, self.steps = step, action, [], []

    def on_message(self, text: str) -> None:
        self.messages.append(text)

    def on_step(self, info: Any) -> None:
        self.steps.append(info.step)
        if info.step == self.step:
            self.action()


def assert_same_ends(one: Path, other: Path) -> None:
    """The learned parameters, and the optimizer with its momentum, bit for bit."""
    (_, a), (_, b) = read_run(one), read_run(other)
    assert a.step == b.step and a.parameters.keys() == b.parameters.keys()
    assert all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)
    for ours, theirs in zip(a.optimizer["state"].values(), b.optimizer["state"].values(), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


def write_images(folder: Path, count: int, seed: int = 0, suffix: str = ".png", size: int = 24) -> list[Path]:
    """Random images in ``folder``, which is made; others in a folder of another name or split."""
    folder.mkdir(parents=True, exist_ok=True)
    named = folder.relative_to(folder.parents[1 if split_of(folder.parent.name) else 0])
    rng = np.random.default_rng([seed, zlib.crc32(str(named).encode())])
    paths = [folder / f"{i:03d}{suffix}" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (size, size + 5, 3), dtype=np.uint8)).save(path)
    return paths
