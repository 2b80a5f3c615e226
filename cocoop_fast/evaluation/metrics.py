"""Accuracy and its relatives, from labels and predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """Shortlists against all classes, on a random sample of n of the images. Rates are percentages.

    Args:
        classes: on a shortlist.
        images: n.
        seed: of the sample.
        agreeing: images of the sample that both call the same class.
        correct: those that the shortlists call right.
        correct_of_all: those that all classes call right.
        gained: those that the shortlists alone call right, by leaving out what would be chosen wrongly.
    """

    classes: int
    images: int
    seed: int
    agreeing: int
    correct: int
    correct_of_all: int
    gained: int

    @classmethod
    def of(
        cls, classes: int, seed: int, labels: np.ndarray, by_shortlist: np.ndarray, by_all: np.ndarray
    ) -> Comparison:
        """From labels and both predictions, (n,) integers each.

        Raises:
            ValueError: no images.
        """
        if not labels.size:
            raise ValueError("there are no images to compare")
        right, right_of_all = by_shortlist == labels, by_all == labels
        return cls(
            classes=classes,
            images=int(labels.size),
            seed=seed,
            agreeing=int((by_shortlist == by_all).sum()),
            correct=int(right.sum()),
            correct_of_all=int(right_of_all.sum()),
            gained=int((right & ~right_of_all).sum()),
        )

    @property
    def agreement(self) -> float:
        """Percentage of the sample that both call the same class."""
        return 100.0 * self.agreeing / self.images

    @property
    def difference(self) -> float:
        """Accuracy by shortlists less that by all classes, in percentage points."""
        return 100.0 * (self.correct - self.correct_of_all) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of :attr:`difference` over all images.

        That of matched pairs with half an observation added to each of the four outcomes, which keeps its width where no
        prediction differs (Agresti and Min, Statistics in Medicine 24, 2005).
        """
        n, gained = self.images + 2, self.gained + 0.5
        lost = self.gained - (self.correct - self.correct_of_all) + 0.5
        centre = (gained - lost) / n
        margin = 1.959964 * math.sqrt(gained + lost - n * centre**2) / n
        return 100.0 * (centre - margin), 100.0 * (centre + margin)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        derived = ("agreement", "difference", "interval")
        return {**vars(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class Metrics:
    """Classification results over a set of images; rates are percentages at full precision.

    ``macro_f1`` is the mean F1 score of the classes that occur among the labels, as the reference takes it
    (``sklearn.metrics.f1_score`` with ``labels=unique(labels)``). ``confusion[i][j]`` counts images of class
    i called class j; ``per_class_accuracy`` is ``None`` where a class has no image. ``shortlist`` is ``None`` where every
    image chose among all classes.
    """

    total: int
    correct: int
    accuracy: float
    error: float
    macro_f1: float
    per_class_accuracy: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    shortlist: Comparison | None = None

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON, without the confusion matrix, which has a million numbers for ImageNet."""
        values = {name: value for name, value in vars(self).items() if name not in ("confusion", "shortlist")}
        return values if self.shortlist is None else {**values, "shortlist": self.shortlist.to_mapping()}


def measure(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> Metrics:
    """Compare predictions with labels.

    Args:
        labels: (n,) integers in [0, n_classes).
        predictions: (n,) integers in [0, n_classes).
        n_classes: K.

    Raises:
        ValueError: no images, or arrays of different length.
    """
    from sklearn.metrics import confusion_matrix, f1_score  # takes a second to import

    total = int(labels.size)
    if total == 0:
        raise ValueError("there are no images to measure on")
    confusion = confusion_matrix(labels, predictions, labels=np.arange(n_classes))
    hits, images = confusion.diagonal().tolist(), confusion.sum(axis=1).tolist()
    accuracy = 100.0 * sum(hits) / total
    f1 = f1_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0)
    return Metrics(
        total=total,
        correct=sum(hits),
        accuracy=accuracy,
        error=100.0 - accuracy,
        macro_f1=100.0 * float(f1),
        per_class_accuracy=tuple(
            100.0 * hit / count if count else None for hit, count in zip(hits, images, strict=True)
        ),
        confusion=tuple(map(tuple, confusion.tolist())),
    )


def harmonic_mean(base: float, new: float) -> float:
    """2·base·new / (base + new), the paper's H; 0 if both are 0."""
    return 2.0 * base * new / (base + new) if base + new > 0 else 0.0
