"""A run that the reference began, as one of ours that can be continued; and one of ours in the reference's format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from cocoop_fast.clip.load import load_clip
from cocoop_fast.config import RunConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.errors import UserError
from cocoop_fast.experiments import experiment
from cocoop_fast.methods import build_model
from cocoop_fast.runs import checkpoint, reference_checkpoint
from cocoop_fast.runs.checkpoint import Checkpoint
from cocoop_fast.runs.directory import read_run
from cocoop_fast.runs.recipe import resolve
from cocoop_fast.runs.reference_checkpoint import ReferenceCheckpoint
from cocoop_fast.training.observer import Observer, RunInfo


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
    theirs = reference_checkpoint.load(path)
    dataset = load_dataset(config.data)
    config = resolve(config, dataset)
    _check(theirs, config, select_classes(dataset, config.data.subset).classnames)
    folder = cast(Path, config.output_dir)
    if (folder / "config.yaml").exists() and not overwrite:
        raise UserError(
            f"{folder} holds a run already; choose another directory, or discard it with --overwrite."
        )
    beginning = _Beginning()
    with suppress(_Begun):
        experiment.run(config, observer=beginning, overwrite=overwrite)
    untrained = checkpoint.load_newest(folder / "checkpoints")
    assert untrained is not None and untrained.step == 0  # it has just been written
    checkpoint.save(folder / "checkpoints", _continued(untrained, theirs, beginning.steps_per_epoch))
    return folder, theirs.epoch


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
    model = build_model(config.prompt, newest.classnames, load_clip(config.model))
    checkpoint.load_parameters(model, newest.parameters, str(run_dir))
    return reference_checkpoint.save(
        (folder or run_dir) / "prompt_learner",
        model,
        config.optim,
        newest.optimizer,
        accuracy=None,
        epochs=newest.epoch - 1,
    )


class _Begun(Exception):
    """A run has written its first checkpoint."""


class _Beginning(Observer):
    """Lets a run check everything and write its beginning, and stops it there."""

    steps_per_epoch = 0

    def on_run_start(self, info: RunInfo) -> None:
        self.steps_per_epoch = info.steps_per_epoch

    def on_checkpoint(self, path: Path) -> None:
        raise _Begun


def _check(theirs: ReferenceCheckpoint, config: RunConfig, classnames: Sequence[str]) -> None:
    """Before anything is written."""
    if theirs.epoch < 1:
        raise UserError(
            f"{theirs.path} does not say how many epochs it was trained; evaluate it with "
            "`cocoop-fast eval --reference-checkpoint`.",
            exit_status=1,
        )
    if theirs.epoch > (config.optim.epochs or 0):
        raise UserError(
            f"{theirs.path} was trained {theirs.epoch} epochs, but the configuration says {config.optim.epochs}; give "
            "the one that it was trained with.",
            exit_status=1,
        )
    model = build_model(config.prompt, classnames, load_clip(config.model))
    checkpoint.check_parameters(
        dict(model.prompt_learner.named_parameters()), theirs.parameters, str(theirs.path)
    )
    if theirs.momentum is None:
        raise UserError(
            f"{theirs.path} has no momentum of SGD for what it learned, so training cannot go on from it; evaluate it "
            "with `cocoop-fast eval --reference-checkpoint`.",
            exit_status=1,
        )


def _continued(untrained: Checkpoint, theirs: ReferenceCheckpoint, steps_per_epoch: int) -> Checkpoint:
    """The reference's float16 becomes what our run keeps; the learning rate follows from the epoch."""
    own, momentum = untrained.parameters, theirs.momentum
    assert momentum is not None  # it has been checked
    state = {i: {"momentum_buffer": momentum[name].to(own[name].dtype)} for i, name in enumerate(own)}
    return replace(
        untrained,
        parameters={name: theirs.parameters[name].to(value.dtype) for name, value in own.items()},
        optimizer={**untrained.optimizer, "state": state},
        epoch=theirs.epoch + 1,
        batch=0,
        step=theirs.epoch * steps_per_epoch,
    )
