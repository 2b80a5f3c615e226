"""What recording a pass saves: a step from the recording against the same step call by call, taken in turns."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest

from cocoop_fast.measure.contestants import BY_NAME
from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names
from cocoop_fast.measure.timing import seconds_of
from cocoop_fast.ops import cpu

ROUNDS = {20: 30, 100: 12, 119: 100}  # by classes
WARM_UP = 3  # a pass is looked at, then recorded


@pytest.mark.parametrize(("k", "model"), [(20, None), (100, None), (119, "icons")])
def test_recorded_passes(
    benchmark: Any, problem_of: Any, monkeypatch: Any, k: int, model: str | None
) -> None:
    problem = build_problem(ProblemSpec(imagenet_names(k), model=model)) if model else problem_of(k, 1)
    recorded, plain = (BY_NAME["engine"].build(problem) for _ in range(2))
    seconds: dict[str, list[float]] = {"recorded": [], "plain": []}

    def call_by_call() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "record", None)
            seconds["plain"].append(seconds_of(plain.step))

    benchmark.group = f"step from a recording, {k} classes, {model or 'a tower of ViT-B/16'}"
    benchmark.pedantic(
        lambda: seconds["recorded"].append(seconds_of(recorded.step)),
        setup=call_by_call,
        rounds=ROUNDS[k],
        warmup_rounds=WARM_UP,
    )
    pairs = list(zip(seconds["recorded"], seconds["plain"], strict=True))[WARM_UP:]
    benchmark.extra_info |= {
        "classes": k,
        "model": model,
        "times_the_step_call_by_call": min(one for one, _ in pairs) / min(one for _, one in pairs),
        "median_of_pairs": median(with_it / without for with_it, without in pairs),
    }
