"""Peak memory of a training step above the loaded model, each contestant in a process of its own."""

import pytest

from cocoop_fast.measure.compare import why_too_large
from cocoop_fast.measure.contestants import BY_NAME
from cocoop_fast.measure.cost import TreeCost, layout_on
from cocoop_fast.measure.peak_memory import peak_memory
from cocoop_fast.measure.problem import ProblemSpec, imagenet_names

CASES = [
    ("dense", 100),
    ("truncated", 100),
    ("truncated+compile", 100),
    ("padding-free", 100),
    ("tree+torch", 100),
    ("engine", 100),
    ("radix", 100),
    ("padding-free", 1000),
    ("radix", 1000),
    ("tree+torch", 1000),
    ("engine", 1000),
]


@pytest.mark.parametrize(("name", "k"), CASES)
def test_peak_memory_of_a_step(benchmark, problem_of, name, k):
    contestant, problem = BY_NAME[name], problem_of(k, 1)
    reason = contestant.why_not(problem) or why_too_large(contestant, problem)
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = f"peak memory, {k} classes"
    spec = ProblemSpec(imagenet_names(k))
    peak = benchmark.pedantic(peak_memory, args=(spec, name), rounds=1)
    benchmark.extra_info |= {"contestant": name, "classes": k, "peak_mb": round(peak / 1e6)}
    if name == "engine":
        saved = TreeCost(problem.weights, problem.tree, layout_on("cpu")).step(1).saved_bytes
        benchmark.extra_info["saved_activations_mb"] = round(saved / 1e6)
