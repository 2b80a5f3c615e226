"""Many classes in little memory, and pruning: the streaming and pruning figures of docs/performance.md.

    python tools/measure_limits.py --out benchmarks/results/limits.json   # several minutes
    python tools/measure_limits.py --only streaming                       # one part, printed

Every measurement has a process of its own, so that its peak memory is its own. The model is a text tower of ViT-B/16's
size with random weights, in float32; one image; a step is forward and backward to the gradient of the contexts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.cli.output import print_table
from cocoop_fast.engine.encoder import TreeTextEncoder
from cocoop_fast.engine.pruning import pruned_cross_entropy
from cocoop_fast.measure.machine import describe_machine, one_line
from cocoop_fast.measure.peak_memory import peak_since, settled_memory
from cocoop_fast.measure.problem import Problem, ProblemSpec, build_problem, imagenet_names
from cocoop_fast.ops.head import cosine_logits_ref

BUDGET, LARGE_BUDGET = "256MB", "1GB"
GROWTH = (100, 300, 1000, 3000, 10000, 21841)
TAU = 0.01
TOP_PROBABILITY, REST_CLASSES, REST_MASS = 0.3, 120, 0.99  # of the softmax that pruning is measured under


def encoder_of(problem: Problem, budget: str | None = None) -> TreeTextEncoder:
    return TreeTextEncoder(problem.clip_model, problem.tree, memory_budget=budget)


def contexts_of(problem: Problem) -> Tensor:
    learner = problem.learner()
    with torch.no_grad():
        return learner.contexts(F.normalize(problem.features, dim=-1))


def streamed_step(classes: int, budget: str | None, rounds: int) -> dict[str, Any]:
    """The best time, the peak memory above the loaded model, and the gradient."""
    problem = build_problem(ProblemSpec(imagenet_names(classes)))
    contexts = contexts_of(problem)
    before = settled_memory()
    encoder = encoder_of(problem, budget)
    seconds = []
    for _ in range(rounds):
        leaf = contexts.clone().requires_grad_()
        start = time.perf_counter()
        features = encoder(leaf)
        probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(features, leaf, probe)
        seconds.append(time.perf_counter() - start)
    tower = encoder._current_tower(deep=False)
    pieces = encoder.memory.pieces(tower, 1, keeps=True)
    return {
        "classes": classes,
        "rows": problem.tree.rows,
        "budget": budget,
        "shards": len(pieces.shards),
        "seconds": min(seconds),
        "peak_bytes": peak_since(before),
        "gradient": gradient.flatten().tolist(),
    }


def pruned_step(classes: int, rounds: int) -> dict[str, Any]:
    """The exact step against one that leaves out TAU, under a softmax of a trained model's shape.

    Random weights give nearly equal logits at CLIP's scale, so the scale is set: see :func:`peaked_image`.
    """
    problem = build_problem(ProblemSpec(imagenet_names(classes)))
    contexts, encoder = contexts_of(problem), encoder_of(problem)
    with torch.no_grad():
        text = F.normalize(encoder(contexts)[0], dim=-1)
    image, scale, probabilities = peaked_image(text)
    label = probabilities.argmax().reshape(1)

    def exact() -> tuple[Tensor, float]:
        leaf = contexts.clone().requires_grad_()
        start = time.perf_counter()
        loss = F.cross_entropy(cosine_logits_ref(image, encoder(leaf), scale), label)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, time.perf_counter() - start

    kept = left_out = 0.0

    def pruned() -> tuple[Tensor, float]:
        nonlocal kept, left_out
        leaf = contexts.clone().requires_grad_()
        start = time.perf_counter()
        loss, _, said = pruned_cross_entropy(encoder, leaf, image, scale, label, TAU)
        (gradient,) = torch.autograd.grad(loss, leaf)
        kept, left_out = said.classes_kept, said.share_left_out
        return gradient, time.perf_counter() - start

    times: dict[str, list[float]] = {"exact": [], "pruned": []}
    gradients: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, run in (("exact", exact), ("pruned", pruned)):
            gradients[name], seconds = run()
            times[name].append(seconds)
    error = float((gradients["pruned"] - gradients["exact"]).norm() / gradients["exact"].norm())
    return {
        "classes": classes,
        "tau": TAU,
        "top_probability": float(probabilities.max()),
        "classes_of_rest": _classes_of_rest(probabilities),
        "classes_kept": kept,
        "share_left_out": left_out,
        "relative_gradient_error": error,
        "exact_seconds": min(times["exact"]),
        "pruned_seconds": min(times["pruned"]),
    }


def peaked_image(text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An image feature (1, E), a log scale and the softmax (K,) over (K, E) text features with the wanted shape.

    Of random features, each with the scale that gives its likeliest class TOP_PROBABILITY, the one where nearest to
    REST_CLASSES others hold REST_MASS of the rest.
    """
    found = []
    for seed in range(40):
        noise = torch.randn(1, text.shape[1], generator=torch.Generator().manual_seed(seed))
        image = F.normalize(noise, dim=-1)
        cosines = (image @ text.T).double()
        scale = _scale_for(cosines)
        probabilities = (scale * cosines).softmax(dim=1)[0]
        found.append((abs(_classes_of_rest(probabilities) - REST_CLASSES), seed, image, scale, probabilities))
    _, _, image, scale, probabilities = min(found, key=lambda one: one[:2])
    return image, torch.tensor(scale).log(), probabilities


def _classes_of_rest(probabilities: Tensor) -> int:
    """Classes after the likeliest that hold REST_MASS of what it does not."""
    rest = probabilities.sort(descending=True).values[1:]
    return int((rest.cumsum(0) < REST_MASS * rest.sum()).sum()) + 1


def _scale_for(cosines: Tensor) -> float:
    """The logit scale at which the likeliest class has TOP_PROBABILITY, by bisection."""
    low, high = 1e-3, 1e6
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (
            (middle, high)
            if float((middle * cosines).softmax(dim=1).max()) < TOP_PROBABILITY
            else (low, middle)
        )
    return low


def run_apart(name: str, **arguments: Any) -> dict[str, Any]:
    """One of the measurements above in a new process."""
    request = json.dumps({"name": name, "arguments": arguments})
    done = subprocess.run(
        [sys.executable, __file__, "--child"], input=request, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name} {arguments} failed with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_streaming(rounds: int) -> dict[str, Any]:
    whole = run_apart("streamed_step", classes=1000, budget=None, rounds=rounds)
    parted = run_apart("streamed_step", classes=1000, budget=BUDGET, rounds=rounds)
    a, b = (torch.tensor(one.pop("gradient")) for one in (whole, parted))
    return {
        "whole": whole,
        "streamed": parted,
        "time_ratio": parted["seconds"] / whole["seconds"],
        "relative_gradient_error": float((a - b).abs().max() / a.abs().max()),
    }


def measure_growth() -> list[dict[str, Any]]:
    found = []
    for classes in GROWTH:
        one = run_apart(
            "streamed_step", classes=classes, budget=LARGE_BUDGET, rounds=2 if classes <= 3000 else 1
        )
        del one["gradient"]
        found.append(one)
    return found


def show(found: dict[str, Any]) -> None:
    if "streaming" in found:
        part = found["streaming"]
        print_table(
            ["1000 classes", "shards", "step", "peak memory"],
            [
                [
                    one["budget"] or "no budget",
                    str(one["shards"]),
                    f"{one['seconds']:.2f} s",
                    f"{one['peak_bytes'] / 1e6:.0f} MB",
                ]
                for one in (part["whole"], part["streamed"])
            ],
        )
        print(f"time ratio {part['time_ratio']:.2f}, gradient error {part['relative_gradient_error']:.1e}")
    if "growth" in found:
        print_table(
            [f"Classes, within {LARGE_BUDGET}", "rows", "shards", "step", "ms a row", "peak memory"],
            [
                [
                    f"{one['classes']:,}", f"{one['rows']:,}", str(one["shards"]), f"{one['seconds']:.2f} s",
                    f"{1e3 * one['seconds'] / one['rows']:.3f}", f"{one['peak_bytes'] / 1e6:.0f} MB",
                ]
                for one in found["growth"]
            ],
        )  # fmt: skip
    if "pruning" in found:
        part = found["pruning"]
        print(
            f"tau {part['tau']}: {part['classes_kept']:.0f} of {part['classes']} classes kept, "
            f"{part['share_left_out']:.2%} of the weights left out, gradient error {part['relative_gradient_error']:.1e}, "
            f"step {part['pruned_seconds'] / part['exact_seconds']:.2f} of the exact one "
            f"({part['pruned_seconds']:.2f} against {part['exact_seconds']:.2f} s). Top class {part['top_probability']:.2f}, {REST_MASS:.0%} of the rest in "
            f"{part['classes_of_rest']} classes"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["streaming", "growth", "pruning"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        request = json.load(sys.stdin)
        warnings.simplefilter("ignore")  # of duplicate names
        measure = streamed_step if request["name"] == "streamed_step" else pruned_step
        print(json.dumps(measure(**request["arguments"])))
        return
    found: dict[str, Any] = {"machine": describe_machine()}
    if options.only in (None, "streaming"):
        found["streaming"] = measure_streaming(options.rounds)
    if options.only in (None, "pruning"):
        found["pruning"] = run_apart("pruned_step", classes=1000, rounds=options.rounds)
    if options.only in (None, "growth"):
        found["growth"] = measure_growth()
    show(found)
    print(one_line(found["machine"]))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
