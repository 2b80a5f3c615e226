"""What a configuration leaves open, filled in from the method's published recipe and the data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from cocoop_fast.clip.load import resolve_device, resolve_precision
from cocoop_fast.config import Method, OptimConfig, Precision, PromptConfig, RunConfig
from cocoop_fast.data.dataset import Dataset
from cocoop_fast.errors import UserError
from cocoop_fast.methods.records import METHODS


def resolve(config: RunConfig, dataset: Dataset) -> RunConfig:
    """A configuration in which no ``None`` and no "auto" decides what is computed.

    CoCoOp: batches of 1, 10 epochs. CoOp: batches of 32, and 200 epochs for 8 and 16 shots, 100 for 2 and 4,
    50 for 1, for all images, and for ImageNet whatever the shots (the reference's configurations). The M
    Meta-Nets train as CoCoOp's one does.
    Zero-shot CLIP learns nothing, and a linear probe is fitted without steps: 0 epochs.
    Both learners keep the configuration's ``ctx_init``, as the reference does in the base-to-new setting.

    Args:
        config: as written by a user.
        dataset: its defaults for the transform and the zero-shot template are used.

    Raises:
        UserError: bounds of the crop in the wrong order, or a device that is not there.
    """
    method, optim = METHODS[config.prompt.method], config.optim
    epochs = method.epochs if method.epochs is not None else _epochs(config.data.shots, dataset.name)
    if epochs and optim.epochs is not None:  # what has no steps has no epochs
        epochs = optim.epochs
    scale, flip = config.augment.crop_scale, config.augment.flip
    if scale is not None and scale[0] > scale[1]:
        raise UserError(f"augment.crop_scale is {scale[0]:g} to {scale[1]:g}; give the smaller share first.")
    return replace(
        config,
        model=replace(
            config.model,
            precision=cast(
                Precision, resolve_precision(config.model.precision, resolve_device(config.model.device))
            ),
        ),
        prompt=replace(config.prompt, template=_template(config.prompt, dataset)),
        augment=replace(
            config.augment,
            crop_scale=scale if scale is not None else dataset.crop_scale,
            flip=flip if flip is not None else dataset.flip,
        ),
        optim=replace(
            optim,
            epochs=epochs,
            batch_size=optim.batch_size or method.batch_size,
            master_weights=optim.master_weights and not config.reference_compat,
        ),
        output_dir=config.output_dir or default_output_dir(config),
    )


def _template(prompt: PromptConfig, dataset: Dataset) -> str:
    """The data set's own template; with an ensemble none on ImageNet, for which the ensemble is made."""
    if prompt.template is not None:
        return prompt.template
    return "" if prompt.ensemble != "none" and dataset.name == "imagenet" else dataset.template


def default_output_dir(config: RunConfig) -> Path:
    """output/<data>/<method>/seed<seed>: seeds side by side, as the reference's result parser expects."""
    return Path("output") / config.data.name / config.prompt.method / f"seed{config.seed}"


def with_method(config: RunConfig, method: Method, output_dir: Path) -> RunConfig:
    """The same experiment by another method: that method's own recipe, in a directory of its own."""
    own_recipe: OptimConfig = replace(config.optim, batch_size=None, epochs=None)
    return replace(
        config, prompt=replace(config.prompt, method=method), optim=own_recipe, output_dir=output_dir
    )


def _epochs(shots: int, dataset: str) -> int:
    """CoOp's."""
    if dataset == "imagenet":
        return 50
    if shots >= 8:
        return 200
    return 100 if shots >= 2 else 50
