"""Nobody is timed who computes something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from cocoop_fast.measure.contestants import Contestant, ModelRunner
from cocoop_fast.measure.dense import dense_oracle
from cocoop_fast.measure.problem import Problem

TOLERANCE = 1e-4  # of the largest element; float32 throughout
SMALL_CLASSES, SMALL_BATCH = 6, 2  # where the dense oracle is a matter of seconds


class Disagreement(AssertionError):
    """A contestant's results are not the oracle's."""


def assert_same(name: str, results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Logits and all gradients agree, each to TOLERANCE of its largest element.

    Raises:
        Disagreement: they do not.
    """
    if set(results) != set(expected):
        raise Disagreement(f"{name} has gradients of {sorted(results)}, expected {sorted(expected)}")
    for key, value in expected.items():
        error = float((results[key] - value).abs().max() / value.abs().max().clamp_min(1e-30))
        if not error <= TOLERANCE:
            raise Disagreement(f"{name}: {key} is off by {error:.2e} of its largest element")


def check_against_oracle(problem: Problem, contestants: Iterable[Contestant]) -> None:
    """Every contestant against the dense oracle, over the first classes and two images.

    A compiled one is left to the check at full size, since compiling for another shape takes a minute.

    Raises:
        Disagreement: one of them computes something else.
    """
    small = problem.first(SMALL_CLASSES, SMALL_BATCH)
    expected: dict[str, Mapping[str, Tensor]] = {}
    for contestant in contestants:
        if contestant.oracle is None or contestant.name == "dense" or contestant.setup_seconds:
            continue
        if contestant.why_not() is not None:
            continue
        if contestant.oracle not in expected:
            oracle = dense_oracle(small, conditional=contestant.oracle == "dense")
            expected[contestant.oracle] = ModelRunner(oracle, small.features, small.labels).results()
        runner = contestant.build(small)
        assert isinstance(runner, ModelRunner)
        runner.features, runner.labels = small.features, small.labels  # CoOp brings a batch of its own
        assert_same(contestant.name, runner.results(), expected[contestant.oracle])
