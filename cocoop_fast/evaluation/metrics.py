"""Accuracy and its relatives, from labels and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Classification results over a set of images; rates are percentages at full precision.

    ``macro_f1`` is the mean F1 score of the classes that occur among the labels, as the reference takes it
    (``sklearn.metrics.f1_score`` with ``labels=unique(labels)``). ``confusion[i][j]`` counts images of class
    i called class j; ``per_class_accuracy`` is ``None`` where a class has no image.
    """

    total: int
    correct: int
    accuracy: float
    error: float
    macro_f1: float
    per_class_accuracy: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON, without the confusion matrix, which has a million numbers for ImageNet."""
        return {name: value for name, value in vars(self).items() if name != "confusion"}


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
