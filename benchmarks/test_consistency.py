"""What the losses that keep prompts near CLIP cost: a step with each against one without, taken in turns."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import pytest

from cocoop_fast.measure.contestants import ModelRunner
from cocoop_fast.measure.timing import seconds_of
from cocoop_fast.methods.cocoop import CustomCLIP
from cocoop_fast.methods.consistency import WEIGHTS, Consistency
from cocoop_fast.methods.zeroshot import ensemble_templates

SIZES = {100: 15, 1000: 5}  # classes, rounds


@pytest.mark.parametrize("distance", sorted(WEIGHTS))
@pytest.mark.parametrize("k", SIZES)
def test_consistency(benchmark: Any, problem_of: Any, k: int, distance: Any) -> None:
    problem = problem_of(k, 1)

    def runner(near: Consistency | None) -> ModelRunner:
        names, clip_model = problem.spec.classes, problem.clip_model
        model = CustomCLIP(problem.cfg, names, clip_model)
        model.prompt_learner = problem.learner()
        if near is not None:
            model.keep_near(partial(near.anchor, clip_model=clip_model), names)
        return ModelRunner(model, problem.features, problem.labels)

    consistency = Consistency(distance, *WEIGHTS[distance], ensemble_templates("select", ""))
    plain, near = runner(None), runner(consistency)
    seconds: dict[str, list[float]] = {"plain": [], "near": []}
    benchmark.group = f"step near CLIP, {k} classes"
    benchmark.pedantic(
        lambda: seconds["near"].append(seconds_of(near.step)),
        setup=lambda: seconds["plain"].append(seconds_of(plain.step)),
        rounds=SIZES[k],
        warmup_rounds=1,
    )
    pairs = list(zip(seconds["near"], seconds["plain"], strict=True))[1:]  # after the warm-up
    benchmark.extra_info |= {
        "classes": k,
        "distance": distance,
        "times_the_step_without": min(seconds["near"]) / min(seconds["plain"]),
        "median_of_pairs": median(with_it / without for with_it, without in pairs),
    }
