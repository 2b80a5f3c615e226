"""An epoch end to end, and what it is made of: reading, encoding in the best batch, steps (an epoch of cached views).

On a CPU all parts share the cores, so what overlap can save is what the parts leave idle: an epoch takes at least as long
as its longest part, and about the sum of them where each part keeps all cores busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from cocoop_fast.clip.load import LoadedClip, load_clip
from cocoop_fast.config import DataConfig, ModelConfig, OptimConfig, PromptConfig
from cocoop_fast.data import Dataset, Sample, load_dataset
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.data.transforms import Normalize, TrainTransform
from cocoop_fast.methods import build_model
from cocoop_fast.training.features import ImageFeatures, encode
from cocoop_fast.training.trainer import Trainer
from cocoop_fast.training.view_cache import CachedViews

BATCHES = (1, 4, 16)  # of the image encoder alone


@dataclass(frozen=True)
class Case:
    """What is trained on what."""

    clip: LoadedClip
    dataset: Dataset
    images: int
    crop_scale: tuple[float, float]
    rounds: int

    def batches(self) -> TrainBatches:
        transform = TrainTransform(
            self.clip.image_size, self.crop_scale, 0.0, Normalize(self.clip.mean, self.clip.std)
        )
        return TrainBatches(self.dataset, self.dataset.train[: self.images], transform, 1, seed=1)

    def trainer(self, *, views: Path | None = None, groups_ahead: int = 0) -> Trainer:
        torch.manual_seed(1)
        model = build_model(PromptConfig(), list(self.dataset.classnames), self.clip)
        batches = self.batches()
        features = (
            ImageFeatures(model, batches, "fp32", self.clip.device, groups_ahead=groups_ahead)
            if views is None
            else CachedViews(model, self.clip, batches, 1, views, pytest.fail)
        )
        return Trainer(model, batches, OptimConfig(epochs=1), features=features)


def digits() -> Case:
    dataset = select_classes(load_dataset(DataConfig()), "base")
    return Case(load_clip(ModelConfig(device="cpu")), dataset, 256, (0.8, 1.0), rounds=5)


def photographs() -> Case:
    """Noise of the size of photographs, an untrained ViT-B/16, twenty classes: steps as long as encoding."""
    model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).eval().requires_grad_(False)
    clip = LoadedClip(model, "ViT-B-16-quickgelu", 224, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"), "fp32")
    names = tuple(f"class {i}" for i in range(20))
    samples = tuple(Sample(i, i % 20, names[i % 20]) for i in range(48))

    def read(sample: Sample) -> Image.Image:
        pixels = np.random.default_rng(int(sample.source)).integers(0, 255, (375, 500, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return Case(clip, Dataset("noise", names, samples, (), samples, read), 48, (0.08, 1.0), rounds=1)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.mark.parametrize("make", [digits, photographs])
def test_epoch(benchmark: Any, tmp_path: Path, make: Callable[[], Case]) -> None:
    case = make()
    trainer = case.trainer()
    image = torch.cat([batch.image for batch in case.batches().epoch(1)])
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def encoding_alone(batch: int) -> None:
        for part in image.split(batch):
            encode(trainer.model, part, "fp32")

    def measure_the_rest() -> None:
        """Before each round of the epoch, so that all are measured at the same times."""
        note("reading", seconds(lambda: list(case.batches().epoch(1))))
        for batch in BATCHES:
            note(f"encoding {batch} at once", seconds(lambda batch=batch: encoding_alone(batch)))
        note("steps", seconds(case.trainer(views=tmp_path).fit))
        note("epoch, nothing ahead", seconds(case.trainer().fit))

    case.trainer(views=tmp_path).fit()  # writes the view
    benchmark.group = f"an epoch of {make.__name__}"
    benchmark.pedantic(
        lambda: note("epoch, looking ahead", seconds(case.trainer(groups_ahead=2).fit)),
        setup=measure_the_rest,
        rounds=case.rounds,
        warmup_rounds=int(case.rounds > 1),
    )
    account = {name: round(median(values[-case.rounds :]), 4) for name, values in found.items()}
    encoding = min(account[f"encoding {batch} at once"] for batch in BATCHES)
    longest = max(encoding, account["steps"])
    benchmark.extra_info |= {
        "images": case.images,
        "threads": torch.get_num_threads(),
        "seconds": account,
        "sum_of_parts": round(account["reading"] + encoding + account["steps"], 4),
        "epoch_to_longest_part": round(account["epoch, looking ahead"] / longest, 3),
        "epoch_to_sum_of_parts": round(
            account["epoch, looking ahead"] / (account["reading"] + encoding + account["steps"]), 3
        ),
    }
    print(benchmark.extra_info)
