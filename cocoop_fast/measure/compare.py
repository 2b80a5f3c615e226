"""The whole comparison: who fits, who agrees, how long each takes, how much memory each needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cocoop_fast.engine.memory import free_memory
from cocoop_fast.measure import machine
from cocoop_fast.measure.agreement import assert_same, check_against_oracle
from cocoop_fast.measure.contestants import BY_NAME, Contestant, ModelRunner, Runner, Work
from cocoop_fast.measure.peak_memory import peak_memory
from cocoop_fast.measure.problem import Problem
from cocoop_fast.measure.timing import Timing, interleave, seconds_of

MEMORY_SHARE = 0.8  # of what is available: more would swap


@dataclass(frozen=True)
class Result:
    """One contestant's figures, for the problem's whole batch."""

    contestant: Contestant
    work: Work
    step: Timing
    forward: Timing | None
    peak_bytes: int | None = None  # of a step, above the loaded model


@dataclass
class Comparison:
    """All figures of one problem."""

    problem: Problem
    results: dict[str, Result] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # why a contestant was left out, by name
    others: float | None = None  # share of the processors that other programs used during the measurement

    def ratio_to_floor(self, name: str, action: str = "step") -> float | None:
        """How many times the floor's time."""
        return self._quotient(name, "floor", action)

    def speedup(self, name: str, action: str = "step") -> float | None:
        """How many times faster than the dense oracle."""
        inverse = self._quotient(name, "dense", action)
        return None if inverse is None else 1 / inverse

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
        }

    def _row(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        row: dict[str, Any] = {
            "name": name,
            "title": result.contestant.title,
            "rows": result.work.rows,
            "step_gemm_flops": result.work.step_flops,
            "peak_bytes": result.peak_bytes,
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
        memory: also measure each contestant's peak memory, in a process of its own.
        tell: called with a line about what happens next.

    Raises:
        Disagreement: a contestant computes something else than the oracle.
    """
    comparison = Comparison(problem)
    tell("comparing logits and gradients with the dense oracle")
    check_against_oracle(problem, contestants)
    rate = gemm_rate(problem)
    runners: dict[str, Runner] = {}
    expected: dict[str, dict[str, Any]] = {}
    spent: dict[str, float] = {}
    for contestant in contestants:
        reason = why_left_out(contestant, problem, rate, max_seconds)
        if reason is not None:
            comparison.notes[contestant.name] = reason
            continue
        tell(f"warming up {contestant.name}")
        runner = contestant.build(problem)
        spent[contestant.name] = seconds_of(lambda c=contestant, r=runner: _warm_up(c, r, expected))  # type: ignore[misc]
        runners[contestant.name] = runner
    # Compiling happens once in a program's life: it is not part of what a contestant may spend on being measured.
    spent = {name: 0.0 if BY_NAME[name].setup_seconds else seconds for name, seconds in spent.items()}
    actions: dict[str, Callable[[], object]] = {
        f"{name} step": runner.step for name, runner in runners.items()
    }
    actions |= {f"{name} forward": r.forward for name, r in runners.items() if _has_forward(name)}
    tell(f"measuring, {rounds} rounds")
    others = machine.OtherPrograms()
    timings = interleave(
        actions,
        rounds=rounds,
        max_seconds=max_seconds / 2,
        spent={name: spent[name.rpartition(" ")[0]] / 2 for name in actions},
    )
    comparison.others = others.share()
    for name in runners:
        factor = BY_NAME[name].seconds_per_batch(problem)
        forward = timings.get(f"{name} forward")
        comparison.results[name] = Result(
            contestant=BY_NAME[name],
            work=BY_NAME[name].work(problem),
            step=timings[f"{name} step"].scaled(factor),
            forward=None if forward is None else forward.scaled(factor),
        )
    runners.clear()
    if memory:
        measure_memory(comparison, tell)
    return comparison


def measure_memory(comparison: Comparison, tell: Callable[[str], None] = lambda line: None) -> None:
    """Fill in the peak memory of everyone who was timed, except the floor, which keeps nothing."""
    for name, result in comparison.results.items():
        if result.contestant.oracle is None:
            continue
        tell(f"peak memory of {name}")
        peak = peak_memory(comparison.problem.spec, name)
        comparison.results[name] = Result(
            result.contestant, result.work, result.step, result.forward, peak_bytes=peak
        )


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
    reason = contestant.why_not()
    if reason is not None:
        return reason
    seconds = 1.5 * predicted_seconds(contestant, problem, rate)  # a step and a forward pass
    if seconds > max_seconds:
        return f"would take about {seconds:,.0f} s for one step and one forward pass"
    needed, available = contestant.work(problem).saved_bytes, free_memory(torch.device("cpu"))
    if available is not None and needed > MEMORY_SHARE * available:
        return f"would take about {needed / 1e9:,.0f} GB of memory"
    return None


def _warm_up(contestant: Contestant, runner: Runner, expected: dict[str, dict[str, Any]]) -> None:
    """A first step, whose results must be those of the first contestant under the same oracle."""
    if contestant.oracle is None:
        runner.step()
    else:
        assert isinstance(runner, ModelRunner)
        results = runner.results()
        assert_same(contestant.name, results, expected.setdefault(contestant.oracle, results))
    if _has_forward(contestant.name):
        runner.forward()


def _has_forward(name: str) -> bool:
    return BY_NAME[name].oracle != "coop"  # only CoOp's training step is compared
