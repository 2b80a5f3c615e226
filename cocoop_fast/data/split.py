"""A train/validation/test split for data that come without one."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cocoop_fast.data.dataset import Sample
from cocoop_fast.errors import UserError

_TRAIN, _VAL = 0.5, 0.2  # the rest is for testing; the reference's shares
_SEED = 0  # the split belongs to the data, not to the run: one split for every seed


def split_by_class(
    samples: Sequence[Sample],
) -> tuple[tuple[Sample, ...], tuple[Sample, ...], tuple[Sample, ...]]:
    """Shuffle each class and cut it 50/20/30, as the reference does for sets without an official split.

    Args:
        samples: in an order that is the same on every machine (the split depends on it).

    Returns:
        (train, val, test); each class has at least one image to train on and one to test on.

    Raises:
        UserError: a class has a single image.
    """
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    rng = random.Random(_SEED)
    train: list[Sample] = []
    val: list[Sample] = []
    test: list[Sample] = []
    for label in sorted(by_class):
        items = by_class[label]
        if len(items) < 2:
            raise UserError(
                f"Class {items[0].classname!r} has one image ({items[0].source}), which cannot be split into "
                "training and test images; add images, or make train/ and test/ folders yourself.",
                exit_status=1,
            )
        rng.shuffle(items)
        n_train = max(1, round(len(items) * _TRAIN))
        n_val = min(round(len(items) * _VAL), len(items) - n_train - 1)
        train += items[:n_train]
        val += items[n_train : n_train + n_val]
        test += items[n_train + n_val :]
    return tuple(train), tuple(val), tuple(test)
