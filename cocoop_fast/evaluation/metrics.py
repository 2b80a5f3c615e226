"""Accuracy and its relatives, from labels and predictions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """The same without the confusion matrix, which has a million numbers for ImageNet."""
        return {name: value for name, value in self.to_mapping().items() if name != "confusion"}


def measure(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> Metrics:
    """Compare predictions with labels.

    Args:
        labels: (n,) integers in [0, n_classes).
        predictions: (n,) integers in [0, n_classes).
        n_classes: K.

    Raises:
        ValueError: no images, or arrays of different length.
    """
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise ValueError(f"`labels` {labels.shape} and `predictions` {predictions.shape} must be (n,) alike")
    total = int(labels.size)
    if total == 0:
        raise ValueError("there are no images to measure on")
    confusion = np.bincount(labels * n_classes + predictions, minlength=n_classes**2)
    confusion = confusion.reshape(n_classes, n_classes)
    hits = np.diagonal(confusion)
    with_label, with_prediction = confusion.sum(axis=1), confusion.sum(axis=0)
    correct = int(hits.sum())
    accuracy = 100.0 * correct / total
    present = with_label > 0
    # F1 = 2 TP / (2 TP + FP + FN), and the denominator is (images of the class) + (images called that).
    f1 = 2.0 * hits[present] / (with_label + with_prediction)[present]
    return Metrics(
        total=total,
        correct=correct,
        accuracy=accuracy,
        error=100.0 - accuracy,
        macro_f1=100.0 * float(f1.mean()),
        per_class_accuracy=tuple(
            100.0 * float(hit) / int(count) if count else None
            for hit, count in zip(hits, with_label, strict=True)
        ),
        confusion=tuple(tuple(int(cell) for cell in row) for row in confusion),
    )


def harmonic_mean(base: float, new: float) -> float:
    """2·base·new / (base + new), the paper's H; 0 if both are 0."""
    return 2.0 * base * new / (base + new) if base + new > 0 else 0.0
