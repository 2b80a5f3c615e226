"""Which images a few-shot learner sees, and which classes: the reference's selection, draw for draw."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import ceil

from cocoop_fast.config import Subset
from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.errors import UserError

_MAX_VAL_SHOTS = 4


def sample_shots(dataset: Dataset, shots: int, seed: int) -> Dataset:
    """Keep ``shots`` training images a class, and at most four validation images a class.

    As in the reference: classes in order of first appearance; ``random.sample`` on the training images of
    every class, then on the validation images; a class with fewer images keeps all of them. It is done on
    all classes before base and new ones are separated, so that both are drawn from one sequence. Validation
    images that are the test images (ImageNet) are all kept.

    Args:
        shots: images a class; 0 keeps every image.
        seed: of Python's generator, which the reference seeds with the run's seed.

    Raises:
        UserError: ``shots`` is negative.
    """
    if shots < 0:
        raise UserError(f"data.shots is {shots}; give the number of images a class, or 0 for all of them.")
    if shots == 0:
        return dataset
    rng = random.Random(seed)
    train = _draw(dataset.train, shots, rng)
    val = dataset.val if dataset.val_is_test else _draw(dataset.val, min(shots, _MAX_VAL_SHOTS), rng)
    return dataset.with_splits(train=train, val=val)


def _draw(samples: Sequence[Sample], shots: int, rng: random.Random) -> tuple[Sample, ...]:
    by_label: dict[int, list[Sample]] = {}
    for sample in samples:
        by_label.setdefault(sample.label, []).append(sample)
    drawn: list[Sample] = []
    for items in by_label.values():
        drawn += rng.sample(items, shots) if len(items) >= shots else items
    return tuple(drawn)


def select_classes(dataset: Dataset, subset: Subset) -> Dataset:
    """Keep the first half of the classes ("base", rounded up), the rest ("new"), or "all"; relabel from 0.

    Raises:
        UserError: fewer than four classes, so that a half would hold a single class.
    """
    if subset == "all":
        return dataset
    n_classes = len(dataset.classnames)
    if n_classes < 4:
        raise UserError(
            f"{dataset.where or dataset.name} has {n_classes} classes, and base and new classes need two or "
            "more each; use data.subset all."
        )
    middle = ceil(n_classes / 2)
    kept = range(middle) if subset == "base" else range(middle, n_classes)

    def relabel(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(
            Sample(sample.source, sample.label - kept.start, sample.classname)
            for sample in samples
            if sample.label in kept
        )

    return dataset.with_splits(
        classnames=dataset.classnames[kept.start : kept.stop],
        train=relabel(dataset.train),
        val=relabel(dataset.val),
        test=relabel(dataset.test),
    )
