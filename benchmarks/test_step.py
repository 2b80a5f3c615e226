"""A training step: forward, and backward to the gradients of the context and the Meta-Net."""

import pytest
from cases import CASES


@pytest.mark.parametrize(("name", "k", "b"), CASES)
def test_step(measure, name, k, b):
    measure(name, k, b, "step")
