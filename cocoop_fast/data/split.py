"""Random splits for data that come without one: the reference's two algorithms, draw for draw."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.errors import UserError

_TRAIN, _VAL = 0.5, 0.2  # the rest is for testing
_VAL_OF_TRAINVAL = 0.2


def split_by_class(samples: Sequence[Sample], seed: int = 0) -> Splits:
    """Shuffle each class and cut it 50/20/30 (the reference's ``read_and_split_data``).

    The reference refuses a class too small for three parts; here it has at least one image to train on and
    one to test on.

    Args:
        samples: in an order that is the same on every machine (the split depends on it). Classes are shuffled in
            order of first appearance.
        seed: belongs to the data, not to the run: one split for every seed of a run.

    Raises:
        UserError: a class has a single image.
    """
    rng = random.Random(seed)
    train: list[Sample] = []
    val: list[Sample] = []
    test: list[Sample] = []
    for items in _by_class(samples):
        if len(items) < 2:
            raise UserError(
                f"Class {items[0].classname!r} has one image ({items[0].source}), which cannot be split into "
                "training and test images; add images, or say yourself which are for training and which for "
                "testing.",
                exit_status=1,
            )
        rng.shuffle(items)
        n_train = max(1, round(len(items) * _TRAIN))
        n_val = min(round(len(items) * _VAL), len(items) - n_train - 1)
        train += items[:n_train]
        val += items[n_train : n_train + n_val]
        test += items[n_train + n_val :]
    return Splits(tuple(train), tuple(val), tuple(test))


def split_trainval(
    trainval: Sequence[Sample], seed: int = 0
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Shuffle each class and take the first fifth for validation (the reference's ``split_trainval``).

    Args:
        trainval: in the order of the official list; classes are shuffled in order of first appearance.
        seed: as for :func:`split_by_class`.

    Returns:
        (train, val), each class after class in shuffled order.
    """
    rng = random.Random(seed)
    train: list[Sample] = []
    val: list[Sample] = []
    for items in _by_class(trainval):
        n_val = round(len(items) * _VAL_OF_TRAINVAL)
        rng.shuffle(items)
        val += items[:n_val]
        train += items[n_val:]
    return tuple(train), tuple(val)


def _by_class(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.label, []).append(sample)
    return list(groups.values())
