"""What pruning at the level of rounding does to the gradient of trained prompts, image by image, against float64.

    cocoop-fast train --dataset icons --shots 2 --output-dir RUN
    python tools/measure_pruning_error.py RUN                 # a thousand of its test images
    python tools/measure_pruning_error.py RUN --tau 1e-8 1e-6 1e-4

An error is that of the gradient by all that is learned, in the Euclidean norm, relative to the gradient. It is compared with that of
the engine without pruning: leaving classes out is free only where its error drowns in rounding.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.cli.output import print_table
from cocoop_fast.data import load_dataset
from cocoop_fast.evaluation.evaluate import test_transform
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.runs.directory import read_run

WORSE = 1.1  # times the error without pruning


def gradient(model: Any, features: Tensor, label: Tensor) -> tuple[Tensor, int]:
    """Of the loss of one image by all that is learned, (n,), and the number of classes that backward went through."""
    model.prompt_learner.zero_grad()
    model.loss_and_logits(features, label)[0].backward()
    kept = model.pruned.classes_kept if model.prune_mass else model.n_classes
    return torch.cat([one.grad.flatten() for one in model.prompt_learner.parameters()]).double(), kept


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the directory of a run of CoCoOp")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--tau", type=float, nargs="+", default=[1e-8, 1e-7, 1e-6, 1e-5])
    args = parser.parse_args(arguments)

    predictor, (config, _) = Predictor.from_run(args.run), read_run(args.run)
    model: Any = predictor.model
    model.prompt_learner.train()
    exact = copy.deepcopy(model).double()
    dataset, transform = load_dataset(config.data), test_transform(predictor.clip)
    number = {name: label for label, name in enumerate(predictor.classnames)}
    samples = [one for one in dataset.test if one.classname in number]
    chosen = samples[:: max(1, len(samples) // args.images)][: args.images]

    taus = [0.0, *args.tau]
    errors: dict[float, list[float]] = {tau: [] for tau in taus}
    kept: dict[float, list[int]] = {tau: [] for tau in taus}
    for sample in chosen:
        image, label = transform(dataset.read(sample))[None], torch.tensor([number[sample.classname]])
        with torch.no_grad():
            features = model.image_encoder(image)
        true, _ = gradient(exact, features.double(), label)
        for tau in taus:
            model.prune_mass = tau
            found, classes = gradient(model, features, label)
            errors[tau].append(float((found - true).norm() / true.norm()))
            kept[tau].append(classes)

    rows = []
    for tau in taus:
        ratios = [with_it / without for with_it, without in zip(errors[tau], errors[0.0], strict=True)]
        rows.append(
            [
                f"{tau:g}" if tau else "without",
                f"{median(kept[tau]):g} of {model.n_classes}",
                f"{median(errors[tau]):.1e}",
                f"{max(errors[tau]):.1e}",
                f"{sum(ratio > WORSE for ratio in ratios) / len(ratios):.1%}",
                f"{max(ratios):.2f} x",
            ]
        )
    print(f"{len(chosen)} test images of {dataset.name}")
    heads = ["prune_mass", "classes in backward", "median error", "largest", "worse by a tenth", "at worst"]
    print_table(heads, rows)


if __name__ == "__main__":
    main()
