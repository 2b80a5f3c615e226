"""Handwritten digits: 1,797 scans of 8x8 pixels that scikit-learn carries, so no download is needed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from cocoop_fast.config import DataConfig
from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.data.split import split_by_class

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@lru_cache(maxsize=1)
def _load() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 grey values and (1797,) labels."""
    from sklearn.datasets import load_digits  # takes a second to import, and only this data set needs it

    scans = load_digits()
    pixels = np.round(scans.images * (255.0 / 16.0)).astype(np.uint8)  # scans count 0..16 of 4x4 black dots
    return pixels, scans.target


def read(sample: Sample) -> Image.Image:
    """The 8x8 scan as an RGB image; the transform enlarges it."""
    pixels, _ = _load()
    return Image.fromarray(pixels[sample.source]).convert("RGB")


def load(config: DataConfig) -> Dataset:
    """All ten digits, split 50/20/30 a class. ``data.root`` is not used."""
    _, labels = _load()
    classnames = tuple(f"digit {word}" for word in _WORDS)
    samples = [Sample(i, int(label), classnames[label]) for i, label in enumerate(labels)]
    train, val, test = split_by_class(samples)
    return Dataset(
        name="digits",
        classnames=classnames,
        train=train,
        val=val,
        test=test,
        read=read,
        where="the digits that ship with scikit-learn",
        crop_scale=(0.8, 1.0),  # a smaller crop of a digit is often another digit
        flip=0.0,  # a mirrored 2 is not a 2
    )
