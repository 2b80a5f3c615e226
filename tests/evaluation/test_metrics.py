"""Metrics against scikit-learn, as the reference computes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from cocoop_fast.evaluation.metrics import harmonic_mean, measure


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=80))
def test_against_sklearn(pairs):
    labels, predictions = (np.array(column) for column in zip(*pairs, strict=True))
    metrics = measure(labels, predictions, 7)
    assert metrics.total == len(pairs)
    assert metrics.correct == (labels == predictions).sum()
    assert metrics.accuracy == pytest.approx(100 * accuracy_score(labels, predictions), rel=1e-12)
    assert metrics.error == pytest.approx(100 - metrics.accuracy)
    f1 = f1_score(labels, predictions, average="macro", labels=np.unique(labels), zero_division=0)
    assert metrics.macro_f1 == pytest.approx(100 * f1, rel=1e-12)
    assert np.array_equal(metrics.confusion, confusion_matrix(labels, predictions, labels=range(7)))
    for label, accuracy in enumerate(metrics.per_class_accuracy):
        of_class = labels == label
        if not of_class.any():
            assert accuracy is None
        else:
            assert accuracy == pytest.approx(100 * (predictions[of_class] == label).mean())


def test_nothing_to_measure():
    nothing = np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match=r"no images"):
        measure(nothing, nothing, 3)
    with pytest.raises(ValueError, match=r"must be \(n,\) alike"):
        measure(np.array([1]), np.array([1, 2]), 3)


def test_harmonic_mean():
    assert harmonic_mean(80.47, 71.69) == pytest.approx(75.83, abs=0.005)  # the paper's average row
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 90.0) == 0.0
