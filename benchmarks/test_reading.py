"""Images a second that processes read for steps of one image: several in a message against one, in turns."""

from __future__ import annotations

import time
from statistics import median

import pytest

from cocoop_fast.config import DataConfig
from cocoop_fast.data import batches, load_dataset
from cocoop_fast.data.transforms import Normalize, TrainTransform

IMAGES, ROUNDS = 1000, 5
HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("size", [32, 224])
def test_messages(benchmark, monkeypatch, size):
    dataset = load_dataset(DataConfig(name="digits"))
    transform = TrainTransform(size, (0.3, 1.0), 0.5, Normalize(HALF, HALF))
    train = batches.TrainBatches(dataset, dataset.train[:IMAGES], transform, 1, seed=1, workers=2)

    def seconds(images: int) -> float:
        monkeypatch.setattr(batches, "_IMAGES_A_MESSAGE", images)
        epoch = train.epoch(1)
        next(epoch)  # the processes are there
        began = time.perf_counter()
        assert sum(1 for _ in epoch) == len(train.samples) - 1
        return time.perf_counter() - began

    together = batches._IMAGES_A_MESSAGE
    pairs = [(seconds(1), seconds(together)) for _ in range(ROUNDS)]
    rates = [(len(train.samples) - 1) / median(times) for times in zip(*pairs, strict=True)]
    benchmark.extra_info |= {"images a second, one a message": rates[0], "together": rates[1]}
    benchmark.pedantic(seconds, args=(together,), rounds=1)
    ratio = median(one / other for one, other in pairs)
    print(
        f"\n{size} pixels: {rates[0]:.0f} images a second, {rates[1]:.0f} together; {ratio:.2f} times, the median of pairs"
    )
