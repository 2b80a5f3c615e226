"""A run that the reference began, as one of ours that can be continued; and one of ours in the reference's format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cocoop_fast.config import ResolvedConfig, RunConfig
from cocoop_fast.errors import UserError
from cocoop_fast.experiments.experiment import opened
from cocoop_fast.experiments.material import Material
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.experiments.training_run import TrainingRun
from cocoop_fast.runs import checkpoint, reference_checkpoint
from cocoop_fast.runs.directory import read_run
from cocoop_fast.runs.recipe import resolve
from cocoop_fast.runs.reference_checkpoint import ReferenceCheckpoint
from cocoop_fast.training.observer import Observer


def import_checkpoint(config: RunConfig, path: Path, *, overwrite: bool = False) -> tuple[Path, int]:
    """Make a run directory that goes on where a checkpoint of the reference stands.

    Parameters, momentum and the position in the schedule are taken over. The order and the crops of the images from
    there on are this program's, not those that the reference would have drawn.

    Args:
        config: what the checkpoint was trained with; its ``output_dir`` becomes the run directory.
        path: ``model.pth.tar-N`` or its folder. Nothing in it is run.
        overwrite: discard a run that is in the directory.

    Returns:
        The run directory, and the epochs that are done in it.

    Raises:
        UserError: a file that cannot be read, that was trained with another method, model or number of classes,
            or from which training cannot go on.
    """
    theirs, shared = reference_checkpoint.load(path), Shared()
    dataset = shared.dataset(config.data)
    plan = resolve(config, dataset)
    material = Material(plan, dataset, shared, Observer())
    momentum = _checked_momentum(theirs, plan, material)
    if (plan.output_dir / "config.yaml").exists() and not overwrite:
        raise UserError(
            f"{plan.output_dir} holds a run already; choose another directory, or discard it with --overwrite."
        )
    with opened([plan], material, overwrite=overwrite) as [directory]:
        training = TrainingRun(plan, directory, material)
        training.begin()
        untrained = training.state()
        # The reference's float16 becomes what our run keeps; the learning rate follows from the epoch.
        kept = {name: value.dtype for name, value in untrained.parameters.items()}
        state = {i: {"momentum_buffer": momentum[name].to(kept[name])} for i, name in enumerate(kept)}
        continued = replace(
            untrained,
            parameters={name: theirs.parameters[name].to(dtype) for name, dtype in kept.items()},
            optimizer={**untrained.optimizer, "state": state},
            epoch=theirs.epoch + 1,
            step=theirs.epoch * len(training.trainer.batches),
        )
        checkpoint.save(directory.checkpoints, continued)
    return plan.output_dir, theirs.epoch


def export_checkpoint(run_dir: Path, folder: Path | None = None) -> Path:
    """Write the newest checkpoint of a run in the reference's format.

    Args:
        run_dir: a run, finished or not.
        folder: where the reference looks for ``prompt_learner/``; ``None``: the run directory itself.

    Returns:
        The file, ``prompt_learner/model.pth.tar-N``.

    Raises:
        UserError: no run there, a method that the reference's format cannot hold, or an epoch that is not over.
    """
    config, newest = read_run(run_dir)
    if "ctx" not in newest.parameters:
        raise UserError(
            f"The {config.prompt.method} run in {run_dir} learns no context, so there is nothing to export."
        )
    if newest.batch:
        raise UserError(
            f"The newest checkpoint in {run_dir} is {newest.batch} batches into epoch {newest.epoch}, and the "
            "reference's format knows whole epochs only; let the epoch finish.",
            exit_status=1,
        )
    model = Shared().model(config, newest.classnames)
    checkpoint.load_parameters(model, newest.parameters, str(run_dir))
    return reference_checkpoint.save(
        (folder or run_dir) / "prompt_learner",
        model,
        config.optim,
        newest.optimizer,
        epochs=newest.epoch - 1,
    )


def _checked_momentum(
    theirs: ReferenceCheckpoint, config: ResolvedConfig, material: Material
) -> dict[str, Tensor]:
    """What SGD accumulated, of a checkpoint from which training can go on. Nothing has been written yet."""
    if theirs.epoch < 1:
        raise UserError(
            f"{theirs.path} does not say how many epochs it was trained; evaluate it with "
            "`cocoop-fast eval --reference-checkpoint`.",
            exit_status=1,
        )
    if theirs.epoch > config.optim.epochs:
        raise UserError(
            f"{theirs.path} was trained {theirs.epoch} epochs, but the configuration says {config.optim.epochs}; give "
            "the one that it was trained with.",
            exit_status=1,
        )
    model = material.model(config.prompt, config.data.subset)
    checkpoint.check_parameters(
        dict(model.prompt_learner.named_parameters()), theirs.parameters, str(theirs.path)
    )
    if theirs.momentum is None:
        raise UserError(
            f"{theirs.path} has no momentum of SGD for what it learned, so training cannot go on from it; evaluate it "
            "with `cocoop-fast eval --reference-checkpoint`.",
            exit_status=1,
        )
    if not all(value.isfinite().all() for value in theirs.momentum.values()):
        raise UserError(
            f"{theirs.path} has momentum that is not finite, so training cannot go on from it.", exit_status=1
        )
    return theirs.momentum
