"""Metrics against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoop_fast.evaluation.metrics import harmonic_mean, measure


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=80))
def test_against_the_definitions(pairs):
    metrics = measure(*(np.array(column) for column in zip(*pairs, strict=True)), 7)
    counts = [[pairs.count((label, called)) for called in range(7)] for label in range(7)]
    hits = [counts[k][k] for k in range(7)]
    assert (metrics.total, metrics.correct) == (len(pairs), sum(hits))
    assert metrics.accuracy == pytest.approx(100 * sum(hits) / len(pairs), rel=1e-12)
    assert metrics.error == pytest.approx(100 - metrics.accuracy)
    assert [list(row) for row in metrics.confusion] == counts
    of_class = [sum(counts[k]) for k in range(7)]
    called = [sum(row[k] for row in counts) for k in range(7)]
    # F1 = 2 TP / (2 TP + FP + FN), of the classes that have images.
    f1 = [2 * hits[k] / (of_class[k] + called[k]) for k in range(7) if of_class[k]]
    assert metrics.macro_f1 == pytest.approx(100 * sum(f1) / len(f1), rel=1e-12)
    shares = [100 * hits[k] / of_class[k] if of_class[k] else None for k in range(7)]
    assert metrics.per_class_accuracy == pytest.approx(tuple(shares))


def test_nothing_to_measure():
    nothing = np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match=r"no images"):
        measure(nothing, nothing, 3)
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples"):
        measure(np.array([1]), np.array([1, 2]), 3)


def test_harmonic_mean():
    assert harmonic_mean(80.47, 71.69) == pytest.approx(75.83, abs=0.005)  # the paper's average row
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 90.0) == 0.0
