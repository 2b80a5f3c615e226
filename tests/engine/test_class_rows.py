"""Features of the distinct prompts to those of the classes, and back."""

from __future__ import annotations

import pytest
import torch

from cocoop_fast.engine.class_rows import ClassRows
from cocoop_fast.ops.extensions import CPP

cpu = pytest.importorskip("cocoop_fast.ops.cpu")


@pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("row", [[0], [2, 0, 1], [1, 1, 0, 2, 1, 0], [0] * 5])
@pytest.mark.parametrize("expanded", [False, True])
def test_equals_indexing(row, expanded):
    """Also where several classes have one prompt, and the gradient is one number."""
    features = torch.randn(2, max(row) + 1, 5, requires_grad=True)
    classes = ClassRows(torch.tensor(row), torch.device("cpu"))
    selected, expected = classes(features, cpu), classes(features, None)
    assert selected.equal(expected)
    probe = torch.ones(()).expand_as(expected) if expanded else torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(selected, features, probe)
    (expected_gradient,) = torch.autograd.grad(expected, features, probe)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert classes(features, cpu).equal(expected)


def test_each_turn_has_every_row_once():
    turns = ClassRows(torch.tensor([1, 1, 0, 2, 1, 0]), torch.device("cpu")).turns
    assert [(classes.tolist(), rows.tolist()) for classes, rows in turns] == [
        ([2, 0, 3], [0, 1, 2]),
        ([5, 1], [0, 1]),
        ([4], [1]),
    ]
