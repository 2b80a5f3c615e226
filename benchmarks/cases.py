"""The contestants and sizes that the step and the forward pass are measured at."""

import pytest

from cocoop_fast.measure.contestants import CONTESTANTS

SIZES = [(k, b) for k in (10, 50, 100, 500, 1000) for b in (1, 4, 8)]
COMPILED_SIZES = [(100, 1)]  # compiling takes a minute for every shape
CASES = [
    pytest.param(contestant.name, k, b, id=f"{contestant.name}-k{k}-b{b}")
    for k, b in SIZES
    for contestant in CONTESTANTS
    if contestant.oracle != "coop" and (not contestant.compiled or (k, b) in COMPILED_SIZES)
]
