"""The whole comparison: who fits, who agrees, how long each takes, how much memory each needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.engine.memory import free_memory
from cocoop_fast.measure import machine
from cocoop_fast.measure.baselines import dense_oracle
from cocoop_fast.measure.contestants import BY_NAME, Contestant, ModelRunner, Runner, Work
from cocoop_fast.measure.peak import Peak, PeakLoops
from cocoop_fast.measure.peak_memory import peak_memory
from cocoop_fast.measure.problem import Problem
from cocoop_fast.measure.timing import Timing, interleave, seconds_of

MEMORY_SHARE = 0.8  # of what is available: more would swap
TOLERANCE = 1e-4  # of the largest element; float32 throughout
SMALL_CLASSES, SMALL_BATCH = 6, 2  # where the dense oracle is a matter of seconds


class Disagreement(AssertionError):
    """A contestant's results are not the oracle's."""


@dataclass(frozen=True)
class Result:
    """One contestant's figures, for the problem's whole batch."""

    contestant: Contestant
    work: Work
    step: Timing
    forward: Timing | None
    peak_bytes: int | None  # of a step, above the loaded model
    step_flops: float  # of the products in the time of `step`


@dataclass
class Comparison:
    """All figures of one problem."""

    problem: Problem
    results: dict[str, Result] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # why a contestant was left out, by name
    others: float | None = None  # share of the processors that other programs used during the measurement

    peak: Peak | None = None  # of the processor, measured in the same rounds; None without the C++ extension

    def of_peak(self, name: str) -> float | None:
        """The share of the processor's multiply-adds that the products of a step are."""
        result = self.results[name]
        return None if self.peak is None else result.step_flops / result.step.best / self.peak.flops

    def ratio_to_floor(self, name: str, action: str = "step") -> float | None:
        """How many times the floor's time."""
        return self._quotient(name, "floor", action)

    def speedup(self, name: str, action: str = "step") -> float | None:
        """How many times faster than the dense oracle."""
        return self._quotient("dense", name, action)

    def _quotient(self, name: str, other: str, action: str) -> float | None:
        mine, theirs = (getattr(self.results.get(key), action, None) for key in (name, other))
        return None if mine is None or theirs is None else mine.best / theirs.best

    def to_mapping(self) -> dict[str, Any]:
        """For JSON. Times in seconds, memory in bytes."""
        spec = self.problem.spec
        return {
            "machine": machine.describe_machine(),
            "model": spec.model_name,
            "pretrained": spec.pretrained,
            "classes": len(spec.classes),
            "batch": spec.batch,
            "n_ctx": self.problem.tree.n_ctx,
            "tree_rows": self.problem.tree.rows,
            "contestants": [self._row(name) for name in self.results],
            "left_out": self.notes,
            "used_by_other_programs": self.others,
            "peak_flops": None if self.peak is None else self.peak.flops,
            "read_bandwidth": None if self.peak is None else self.peak.read_bandwidth,
        }

    def _row(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        row: dict[str, Any] = {
            "name": name,
            "title": result.contestant.title,
            "rows": result.work.rows,
            "step_gemm_flops": result.work.step_flops,
            "peak_bytes": result.peak_bytes,
            "step_of_peak": self.of_peak(name),
        }
        for action in ("step", "forward"):
            timing: Timing | None = getattr(result, action)
            row[action] = None if timing is None else timing.to_mapping()
            row[f"{action}_to_floor"] = self.ratio_to_floor(name, action)
            row[f"{action}_speedup"] = self.speedup(name, action)
        return row


def compare(
    problem: Problem,
    contestants: Sequence[Contestant],
    *,
    rounds: int = 5,
    max_seconds: float = 60.0,
    memory: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measure the contestants in interleaved rounds within this process.

    Args:
        problem: what all compute.
        contestants: who.
        rounds: how often each is measured, after one run that is not.
        max_seconds: the time for each contestant. One that would take longer for its first step and forward pass
            is left out with a note.
        memory: also measure each contestant's peak memory, in a process of its own; not the floor's, which keeps
            nothing.
        tell: called with a line about what happens next.

    Raises:
        Disagreement: a contestant computes something else than the oracle.
    """
    comparison = Comparison(problem)
    tell("comparing logits and gradients with the dense oracle")
    check_against_oracle(problem, contestants)
    rate = gemm_rate(problem)
    actions: dict[str, Callable[[], object]] = {}
    spent: dict[str, float] = {}
    expected: dict[str, dict[str, Tensor]] = {}
    measured = []
    for contestant in contestants:
        name, reason = contestant.name, why_left_out(contestant, problem, rate, max_seconds)
        if reason is not None:
            comparison.notes[name] = reason
            continue
        tell(f"warming up {name}")
        runner = contestant.build(problem)
        actions[f"{name} step"] = runner.step
        if contestant.oracle != "coop":  # of which only the training step is compared
            actions[f"{name} forward"] = runner.forward
        seconds = seconds_of(lambda c=contestant, r=runner: _warm_up(c, r, expected))  # type: ignore[misc]
        # Compiling happens once in a program's life: it is not part of what a contestant may spend on being measured.
        spent |= {key: 0.0 if contestant.compiled else seconds / 2 for key in actions if key not in spent}
        measured.append(contestant)
    tell(f"measuring, {rounds} rounds")
    others, loops = machine.OtherPrograms(), PeakLoops()
    actions |= loops.actions
    timings = interleave(actions, rounds=rounds, max_seconds=max_seconds / 2, spent=spent)
    comparison.others = others.share()
    actions.clear()  # and with them the models
    comparison.peak = loops.peak(timings)
    for contestant in measured:
        peak = None
        if memory and contestant.oracle is not None:
            tell(f"peak memory of {contestant.name}")
            peak = peak_memory(problem.spec, contestant.name)
        factor, forward = contestant.seconds_per_batch(problem), timings.get(f"{contestant.name} forward")
        comparison.results[contestant.name] = Result(
            contestant,
            contestant.work(problem),
            timings[f"{contestant.name} step"].scaled(factor),
            None if forward is None else forward.scaled(factor),
            peak,
            factor * contestant.work(problem).step_flops,
        )
    return comparison


def gemm_rate(problem: Problem) -> float:
    """FLOP/s of this machine's GEMMs, the best of a few forward passes over a few hundred rows."""
    floor = BY_NAME["floor"]
    small = problem.first(min(len(problem.spec.classes), 50), 1)
    runner = floor.build(small)
    runner.forward()
    return floor.work(small).forward_flops / min(seconds_of(runner.forward) for _ in range(3))


def predicted_seconds(contestant: Contestant, problem: Problem, rate: float) -> float:
    """Seconds of one step, within a factor of about two."""
    return contestant.overhead * contestant.work(problem).step_flops / rate


def why_left_out(contestant: Contestant, problem: Problem, rate: float, max_seconds: float) -> str | None:
    """Why a contestant is not measured here, or None."""
    reason = contestant.why_not(problem)
    if reason is not None:
        return reason
    seconds = 1.5 * predicted_seconds(contestant, problem, rate)  # a step and a forward pass
    if seconds > max_seconds:
        return f"would take about {seconds:,.0f} s for one step and one forward pass"
    return why_too_large(contestant, problem)


def why_too_large(contestant: Contestant, problem: Problem) -> str | None:
    """Why there is no memory for a contestant's step, or None."""
    needed, available = contestant.work(problem).saved_bytes, free_memory(torch.device("cpu"))
    if available is None or needed <= MEMORY_SHARE * available:
        return None
    return f"would take about {needed / 1e9:,.0f} GB of memory"


# -- nobody is timed who computes something else -----------------------------------------------------------------


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest element."""
    return float((result - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_same(name: str, results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Logits and all gradients agree, each to TOLERANCE of its largest element.

    Raises:
        Disagreement: they do not.
    """
    if set(results) != set(expected):
        raise Disagreement(f"{name} has gradients of {sorted(results)}, expected {sorted(expected)}")
    for key, value in expected.items():
        error = relative_error(results[key], value)
        if not error <= TOLERANCE:
            raise Disagreement(f"{name}: {key} is off by {error:.2e} of its largest element")


def check_against_oracle(problem: Problem, contestants: Iterable[Contestant]) -> None:
    """Every contestant against the dense oracle, over the first classes and two images.

    A compiled one is left to the check at full size, since compiling for another shape takes a minute.

    Raises:
        Disagreement: one of them computes something else.
    """
    small = problem.first(SMALL_CLASSES, SMALL_BATCH)
    expected: dict[str, dict[str, Tensor]] = {}
    for contestant in contestants:
        if contestant.oracle is None or contestant.name == "dense" or contestant.compiled:
            continue
        if contestant.why_not(problem) is not None:
            continue
        if contestant.oracle not in expected:
            oracle = dense_oracle(small, conditional=contestant.oracle == "dense")
            expected[contestant.oracle] = ModelRunner(oracle, small.features, small.labels).results()
        runner = contestant.build(small)
        assert isinstance(runner, ModelRunner)
        runner.features, runner.labels = small.features, small.labels  # CoOp brings a batch of its own
        assert_same(contestant.name, runner.results(), expected[contestant.oracle])


def _warm_up(contestant: Contestant, runner: Runner, expected: dict[str, dict[str, Tensor]]) -> None:
    """A first step, whose results must be those of the first contestant under the same oracle; a forward pass."""
    if contestant.oracle is None:
        runner.step()
    else:
        assert isinstance(runner, ModelRunner)
        results = runner.results()
        assert_same(contestant.name, results, expected.setdefault(contestant.oracle, results))
    if contestant.oracle != "coop":
        runner.forward()
