"""Peak memory of a training step above the loaded model, each contestant in a process of its own."""

import pytest

from cocoop_fast.engine.memory import free_memory
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
    ("padding-free", 1000),
    ("tree+torch", 1000),
    ("engine", 1000),
]


@pytest.mark.parametrize(("name", "k"), CASES)
def test_peak_memory_of_a_step(benchmark, problem_of, name, k):
    contestant, problem = BY_NAME[name], problem_of(k, 1)
    reason = contestant.why_not()
    if reason is not None:
        pytest.skip(reason)
    expected, available = contestant.work(problem).saved_bytes, free_memory()
    if available is not None and expected > 0.8 * available:
        pytest.skip(f"would take about {expected / 1e9:.0f} GB")
    benchmark.group = f"peak memory, {k} classes"
    spec = ProblemSpec(imagenet_names(k))
    peak = benchmark.pedantic(peak_memory, args=(spec, name), rounds=1)
    benchmark.extra_info |= {"contestant": name, "classes": k, "peak_mb": round(peak / 1e6)}
    if name == "engine":
        saved = TreeCost(problem.weights, problem.tree, layout_on("cpu")).step(1).saved_bytes
        benchmark.extra_info["saved_activations_mb"] = round(saved / 1e6)
