"""Checkpoints: small, durable, safe to load, and enough to go on bit for bit.

A checkpoint is an ordinary torch file that ``torch.load(weights_only=True)`` reads. It holds what is learned
(not CLIP, not the token buffers), the optimizer, where the run stands, the random states and the
configuration. Its zip format carries a CRC of every part, which is verified on reading.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.errors import UserError
from cocoop_fast.files.atomic import make_folder, sync_directory, write_atomically
from cocoop_fast.files.torch_archive import read_archive
from cocoop_fast.methods.base import ImageClassifier

_MAGIC = "cocoop_fast checkpoint"
_VERSION = 1
_NAME = re.compile(r"step-(\d{10})\.pt")
_KEPT = 2  # the newest and, in case the disk damages it, the one before
_SET_ASIDE = ".set-aside"  # what follows the name of a file that cannot be read
_ADVICE = "delete it to go on from an older checkpoint, or start again with --overwrite"


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps."""

    config: dict[str, Any]  # resolved, as plain values
    classnames: list[str]  # trained on
    data_fingerprint: str  # of the training samples, in order
    parameters: dict[str, Tensor]  # what the prompt learner learns, by name
    optimizer: dict[str, Any]
    scaler: dict[str, Any]  # empty without loss scaling and skipped steps
    rng: dict[str, Any]
    epoch: int  # 1-based: the epoch of the next step (one past the last epoch when finished)
    batch: int  # batches of that epoch that are done
    step: int  # steps done in all
    seconds: float  # spent training so far
    average: dict[str, Any] = field(default_factory=dict)  # over the epochs so far; empty without one
    other_classes: list[str] = field(default_factory=list)  # of the data set, not trained on


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "optimizer", "scaler", "rng", "average"), (dict,)),
    **dict.fromkeys(("epoch", "batch", "step"), (int,)),
    "classnames": (list,),
    "data_fingerprint": (str,),
    "seconds": (int, float),
}


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``folder/step-<step>.pt`` durably, then delete all but the two newest files.

    Files that cannot be read do not count among the two. They get another name, and are never deleted.

    Raises:
        UserError: the file cannot be written (no space, no permission), or what it would hold is not finite.
    """
    path = folder / f"step-{checkpoint.step:010d}.pt"
    bad = _not_finite(vars(checkpoint))
    if bad is not None:
        raise UserError(
            f"After step {checkpoint.step}, {bad} is not finite, so it is not saved in {folder}; what was saved before is "
            "kept. Use a smaller learning rate.",
            exit_status=1,
        )
    content = {"format": _MAGIC, "version": _VERSION, **vars(checkpoint)}
    try:
        make_folder(folder)
        _set_aside_unreadable(folder)
        write_atomically(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise UserError(
            f"The checkpoint {path} cannot be written ({error}); make room or choose another output "
            "directory, then run the same command to go on from the checkpoint before.",
            exit_status=1,
        ) from error
    for old in _files(folder)[:-_KEPT]:
        old.unlink(missing_ok=True)
    sync_directory(folder)
    return path


def load(path: Path) -> Checkpoint:
    """Read and verify one file. No code in it is run.

    Raises:
        UserError: missing, torn or altered, not a checkpoint of this program and version, or not finite.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else read_archive(path)
    except FileNotFoundError as error:
        raise UserError(f"The checkpoint {path} does not exist.", exit_status=1) from error
    except Exception as error:  # zip, pickle and torch each raise their own on a file that is not theirs
        raise UserError(
            f"The checkpoint {path} is damaged or not a checkpoint; {_ADVICE}.", exit_status=1
        ) from error
    if damaged:
        raise UserError(f"The checkpoint {path} is damaged (in {damaged}); {_ADVICE}.", exit_status=1)
    if not isinstance(content, dict) or content.get("format") != _MAGIC:
        raise UserError(f"{path} is not a checkpoint of cocoop_fast; {_ADVICE}.", exit_status=1)
    if content.get("version") != _VERSION:
        raise UserError(
            f"{path} is a checkpoint of format {content.get('version')}, and this version of cocoop_fast reads "
            f"format {_VERSION}; use the version that wrote it.",
            exit_status=1,
        )
    content = {"average": {}, "other_classes": [], **content}  # files of before there were these
    names = [one.name for one in fields(Checkpoint)]
    if any(name not in content for name in names):
        raise UserError(f"The checkpoint {path} is incomplete; {_ADVICE}.", exit_status=1)
    if not _is_named_tensors(content["parameters"]):
        raise UserError(
            f"The checkpoint {path} holds something else than parameters; {_ADVICE}.", exit_status=1
        )
    wrong = next((name for name, kinds in _KINDS.items() if type(content[name]) not in kinds), None)
    if wrong is not None or any(type(name) is not str for name in content["classnames"]):
        raise UserError(
            f"The checkpoint {path} holds something else than a run's state in `{wrong or 'classnames'}`; {_ADVICE}.",
            exit_status=1,
        )
    bad = _not_finite(content)
    if bad is not None:
        raise UserError(
            f"The checkpoint {path} has values that are not finite in {bad}: its training diverged, or it was altered; "
            f"{_ADVICE}.",
            exit_status=1,
        )
    return Checkpoint(**{name: content[name] for name in names})


def load_newest(folder: Path, on_message: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that can be read; ``None`` if there is no file at all.

    Args:
        folder: where :func:`save` wrote.
        on_message: told of a file that cannot be read, or is not finite, and was passed over.

    Raises:
        UserError: there are files, and none can be read.
    """
    errors: list[UserError] = []
    for path in reversed(_files(folder)):
        try:
            checkpoint = load(path)
        except UserError as error:
            errors.append(error)
            continue
        if errors and on_message is not None:
            on_message(f"{errors[0]} Using {path.name} instead.")
        return checkpoint
    if errors:
        raise errors[0]
    return None


def learned_parameters(model: ImageClassifier) -> dict[str, Tensor]:
    """Copies, on the CPU, of all that the model's prompt learner learns."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.prompt_learner.named_parameters()
    }


@torch.no_grad()
def load_parameters(model: ImageClassifier, parameters: dict[str, Tensor], where: str) -> None:
    """Copy learned parameters into a model, converted to its dtype and device. If they do not fit, it stays as it was.

    Args:
        model: with a ``prompt_learner``.
        parameters: by name, all of them and no others.
        where: the file they come from, for messages.

    Raises:
        UserError: names or shapes differ, or a value is not finite (in the model's dtype).
    """
    own = dict(model.prompt_learner.named_parameters())
    check_parameters(own, parameters, where)
    for name, parameter in own.items():
        parameter.copy_(parameters[name])


def check_parameters(own: Mapping[str, Tensor], parameters: Mapping[str, Tensor], where: str) -> None:
    """Compare what a model learns with what is to be loaded into it.

    Raises:
        UserError: names or shapes differ, or a value is not finite (in the model's dtype).
    """
    if own.keys() != parameters.keys():
        missing, extra = sorted(own.keys() - parameters.keys()), sorted(parameters.keys() - own.keys())
        what = f"lacks {', '.join(missing)}" if missing else f"also has {', '.join(extra)}"
        raise UserError(f"{where} {what}: it was trained with another method.", exit_status=1)
    for name, parameter in own.items():
        if parameter.shape != parameters[name].shape:
            raise UserError(
                f"{where} has `{name}` of shape {tuple(parameters[name].shape)} where the model needs "
                f"{tuple(parameter.shape)}; use the CLIP model and context length it was trained with.",
                exit_status=1,
            )
        if not parameters[name].to(parameter.dtype).isfinite().all():
            raise UserError(
                f"{where} has `{name}` with values that are not finite in {str(parameter.dtype).removeprefix('torch.')}; "
                "its training diverged, or the file was altered.",
                exit_status=1,
            )


def _is_named_tensors(values: object) -> bool:
    return isinstance(values, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in values.items()
    )


def _not_finite(content: Mapping[str, Any]) -> str | None:
    """The first parameter, or the optimizer's memory of one, that has a NaN or an infinite value."""
    for name, value in content["parameters"].items():
        if not value.isfinite().all():
            return f"`{name}`"
    states = content["optimizer"].get("state")
    for state in states.values() if isinstance(states, dict) else ():
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and value.layout == torch.strided and not value.isfinite().all():
                return f"the optimizer's `{name}`"
    return None


def _set_aside_unreadable(folder: Path) -> None:
    for path in _files(folder):
        try:
            load(path)
        except UserError:
            path.replace(path.with_name(path.name + _SET_ASIDE))


def _files(folder: Path) -> list[Path]:
    """Checkpoint files, oldest first (the number in a name has a fixed width)."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
