"""How good the predictions of ``cocoop-fast plan`` are on this machine.

    python tools/check_plan.py --k 20 --k 100        # time and memory of a step and a forward pass
    python tools/check_plan.py --k 100 --layers 4 --no-memory

Prediction and step are measured in turn, in one process on one thread, by the process's own time, so that other
programs matter little. Peak memory is measured in a process of its own, as ``cocoop-fast bench --memory`` does.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from cocoop_fast.cli.output import print_json, print_table
from cocoop_fast.measure.contestants import BY_NAME
from cocoop_fast.measure.cost import TreeCost, layout_on
from cocoop_fast.measure.machine import describe_machine, one_line
from cocoop_fast.measure.peak_memory import peak_memory
from cocoop_fast.measure.predict import seconds_of_pass
from cocoop_fast.measure.problem import (
    Problem,
    ProblemSpec,
    build_problem,
    imagenet_names,
    random_text_tower,
)
from cocoop_fast.measure.this_machine import measure_cpu, measure_process_bytes, use_threads
from cocoop_fast.measure.timing import seconds_of


def check_seconds(problem: Problem, rounds: int = 3) -> dict[str, tuple[float, float]]:
    """Predicted and measured seconds of a step and of a forward pass: the best of each, over interleaved rounds."""
    batch, cost = problem.spec.batch, TreeCost(problem.weights, problem.tree, layout_on("cpu"))
    passes = {"step": cost.step(batch), "forward": cost.inference(batch)}
    runner = BY_NAME["engine"].build(problem)
    actions = {"step": runner.step, "forward": runner.forward}
    predicted: dict[str, list[float]] = {name: [] for name in passes}
    measured: dict[str, list[float]] = {name: [] for name in passes}
    with use_threads(1):
        for action in actions.values():
            action()
        for _ in range(rounds):
            machine = measure_cpu(problem.weights, problem.tree, batch, rounds=2, clock=time.process_time)
            for name, one in passes.items():
                predicted[name].append(seconds_of_pass(one, machine))
                measured[name] += [seconds_of(actions[name], time.process_time) for _ in range(2)]
    return {name: (min(predicted[name]), min(measured[name])) for name in passes}


def check_memory(spec: ProblemSpec) -> tuple[int, int]:
    """Predicted and measured bytes of a step at its peak, beyond the model."""
    problem = build_problem(spec)
    cost = TreeCost(problem.weights, problem.tree, layout_on("cpu"))
    predicted = cost.activation_bytes(spec.batch, keeps=True) + cost.class_list_bytes
    return predicted + measure_process_bytes(), peak_memory(spec, "engine")


def check(k: int, batch: int, layers: int, memory: bool) -> dict[str, Any]:
    spec = ProblemSpec(imagenet_names(k), batch=batch)
    found: dict[str, Any] = {"k": k, "batch": batch, "layers": layers}
    found |= check_seconds(build_problem(spec, random_text_tower(layers)))
    if memory:
        found["memory"] = check_memory(spec)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, action="append", help="classes; may be repeated")
    parser.add_argument("--batch-size", "-b", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12, help="of the text tower whose time is measured")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    results = [
        check(k, options.batch_size, options.layers, not options.no_memory) for k in options.k or [100]
    ]
    if options.json:
        print_json({"machine": describe_machine(), "results": results})
        return
    rows = []
    for result in results:
        for name, unit in (("step", 1e-3), ("forward", 1e-3), ("memory", 1e6)):
            if name in result:
                predicted, measured = result[name]
                values = [f"{value / unit:,.0f} {'ms' if unit < 1 else 'MB'}" for value in result[name]]
                rows.append([str(result["k"]), name, *values, f"{predicted / measured - 1:+.1%}"])
    print_table(["Classes", "Of", "Predicted", "Measured", "Error"], rows, left=2)
    print(one_line(describe_machine()))


if __name__ == "__main__":
    main()
