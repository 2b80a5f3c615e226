"""Many classes in little memory, and pruning: the streaming and pruning figures of docs/performance.md.

    python tools/measure_limits.py --out benchmarks/results/limits.json   # several minutes
    python tools/measure_limits.py --only streaming                       # one part, printed

Every measurement has a process of its own, so that its peak memory is its own. The model is a text tower of ViT-B/16's
size with random weights, in float32; one image; a step is forward and backward of CustomCLIP, from an image
feature to the gradients of all that is learned.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.cli.output import print_table
from cocoop_fast.measure.machine import describe_machine, one_line
from cocoop_fast.measure.peak_memory import in_own_process, peak_since, settled_memory
from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names, random_text_tower
from cocoop_fast.measure.timing import seconds_of
from cocoop_fast.methods.cocoop import CustomCLIP, reference_cfg

BUDGET, LARGE_BUDGET = "256MB", "1GB"
GROWTH = (100, 300, 1000, 3000, 10000, 21841)
TAU = 0.01
TOP_PROBABILITY, REST_CLASSES, REST_MASS = 0.3, 120, 0.99  # of the softmax that pruning is measured under


def streamed_step(classes: int, budget: str | None, rounds: int) -> dict[str, Any]:
    """The best time of a step, the gradient of the context, and the peak memory above the loaded CLIP model.

    That of the construction from class names is included: tokens, class tree, what is learned.
    """
    warnings.simplefilter("ignore")  # of duplicate names
    torch.manual_seed(0)
    clip_model, names = random_text_tower(), imagenet_names(classes)
    cfg = reference_cfg(ctx_init="a photo of a", n_ctx=4, precision="fp32", image_size=224)
    features, label = torch.randn(1, clip_model.text_projection.shape[1]), torch.zeros(1, dtype=torch.int64)
    before = settled_memory()
    model = CustomCLIP(cfg, names, clip_model, memory_budget=budget)

    def step() -> None:
        model.prompt_learner.zero_grad()
        model.forward_features(features, label).backward()

    seconds = min(seconds_of(step) for _ in range(rounds))
    peak, encoder, ctx = peak_since(before), model.tree_encoder, model.prompt_learner.ctx
    assert ctx.grad is not None
    return {
        "classes": classes,
        "rows": encoder.tree.rows,
        "budget": budget,
        "shards": len(encoder.memory.pieces(encoder.tower, 1, keeps=True).shards),
        "seconds": seconds,
        "peak_bytes": peak,
        "gradient": ctx.grad.flatten().tolist(),
    }


def pruned_step(classes: int, rounds: int) -> dict[str, Any]:
    """The exact step against one that leaves out TAU, under a softmax of a trained model's shape.

    Random weights give nearly equal logits at CLIP's scale, so the scale is set: see :func:`peaked_image`. The
    Meta-Net gives zeros, so that the text features are the same whatever the image.
    """
    warnings.simplefilter("ignore")  # of duplicate names
    problem = build_problem(ProblemSpec(imagenet_names(classes)))
    model = CustomCLIP(problem.cfg, problem.spec.classes, problem.clip_model)
    model.prompt_learner.load_state_dict(problem.learned, strict=False)
    with torch.no_grad():
        for parameter in model.prompt_learner.meta_net.parameters():
            parameter.zero_()
        text = F.normalize(model.text_features(F.normalize(problem.features, dim=-1))[0], dim=-1)
        image, scale, probabilities = peaked_image(text)
        model.logit_scale.fill_(scale)
    label, ctx = probabilities.argmax().reshape(1), model.prompt_learner.ctx

    def step() -> None:
        model.prompt_learner.zero_grad()
        model.forward_features(image, label).backward()

    times: dict[float, list[float]] = {0.0: [], TAU: []}
    gradients: dict[float, Tensor] = {}
    for _ in range(rounds):
        for tau, seconds in times.items():
            model.prune_mass = tau
            seconds.append(seconds_of(step))
            assert ctx.grad is not None
            gradients[tau] = ctx.grad.clone()
    error = (gradients[TAU] - gradients[0.0]).norm() / gradients[0.0].norm()
    return {
        "classes": classes,
        "tau": TAU,
        "top_probability": float(probabilities.max()),
        "classes_of_rest": _classes_of_rest(probabilities),
        "classes_kept": model.pruned.classes_kept,
        "share_left_out": model.pruned.share_left_out,
        "relative_gradient_error": float(error),
        "exact_seconds": min(times[0.0]),
        "pruned_seconds": min(times[TAU]),
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


def measure_streaming(rounds: int) -> dict[str, Any]:
    whole, parted = (
        in_own_process(streamed_step, classes=1000, budget=budget, rounds=rounds) for budget in (None, BUDGET)
    )
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
        rounds = 2 if classes <= 3000 else 1
        one = in_own_process(streamed_step, classes=classes, budget=LARGE_BUDGET, rounds=rounds)
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
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": describe_machine()}
    if options.only in (None, "streaming"):
        found["streaming"] = measure_streaming(options.rounds)
    if options.only in (None, "pruning"):
        found["pruning"] = in_own_process(pruned_step, classes=1000, rounds=options.rounds)
    if options.only in (None, "growth"):
        found["growth"] = measure_growth()
    show(found)
    print(one_line(found["machine"]))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
