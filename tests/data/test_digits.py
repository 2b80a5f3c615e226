"""The embedded digits: names, split, and pixels."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset


def test_names_and_split():
    digits = load_dataset(DataConfig())
    assert digits.classnames[0] == "digit zero" and digits.classnames[9] == "digit nine"
    splits = digits.train, digits.val, digits.test
    assert [len(split) for split in splits] == [898, 359, 540]
    sources = [sample.source for split in splits for sample in split]
    assert sorted(sources) == list(range(1797))  # nothing twice, nothing lost
    counts = np.bincount([sample.label for sample in digits.train])
    whole = np.bincount(load_digits().target)
    assert np.abs(counts - whole / 2).max() <= 0.5
    assert load_dataset(DataConfig()).train == digits.train


def test_pixels_are_the_scans():
    digits, scans = load_dataset(DataConfig()), load_digits()
    for sample in digits.test[::50]:
        assert scans.target[sample.source] == sample.label
        image = digits.read(sample)
        assert (image.mode, image.size) == ("RGB", (8, 8))
        pixels = np.asarray(image)
        assert (pixels == pixels[:, :, :1]).all()
        assert np.abs(pixels[:, :, 0] - scans.images[sample.source] * 255 / 16).max() <= 0.5
