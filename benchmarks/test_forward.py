"""The forward pass alone, without gradients."""

import pytest
from cases import CASES


@pytest.mark.parametrize(("name", "k", "b"), CASES)
def test_forward(measure, name, k, b):
    measure(name, k, b, "forward")
