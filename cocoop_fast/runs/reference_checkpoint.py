"""Read and write the reference implementation's checkpoints (``prompt_learner/model.pth.tar-N``).

The reference pickles its learning-rate scheduler object into the file, so ``torch.load`` refuses it or runs code.
:mod:`cocoop_fast.files.torch_archive` reads it without running anything.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.config import OptimConfig
from cocoop_fast.errors import UserError
from cocoop_fast.files.atomic import make_folder, write_atomically
from cocoop_fast.files.torch_archive import read_archive
from cocoop_fast.methods.base import ImageClassifier
from cocoop_fast.training.schedule import reference_state

_TOKEN_BUFFERS = ("token_prefix", "token_suffix")  # constants of CLIP and the class names


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What can be used of the reference's file.

    ``parameters`` are the learned ones by name: ``ctx`` (M, d) and, for CoCoOp, ``meta_net.linear1.weight``
    and so on. ``momentum`` has, by the same names, what SGD accumulated; it is ``None`` if another optimizer was used
    or none was saved. ``epoch`` is the number of epochs trained.
    """

    parameters: dict[str, Tensor]
    momentum: dict[str, Tensor] | None
    epoch: int
    path: Path


def load(path: Path) -> ReferenceCheckpoint:
    """Read a checkpoint without running anything in it.

    Args:
        path: the file, or the folder with the text file ``checkpoint`` that names it (the reference's output
            directory, or its ``prompt_learner`` folder).

    Raises:
        UserError: missing, damaged, in the format of PyTorch before 1.6, without a learned context, or not finite.
    """
    path = _find(path)
    try:
        content = read_archive(path)
    except UserError:
        raise
    except Exception as error:  # a hostile or torn pickle can fail in every way there is
        raise UserError(
            f"The reference checkpoint {path} is damaged or not a checkpoint ({type(error).__name__}); "
            "copy it again from where it was trained.",
            exit_status=1,
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("ctx"), Tensor):
        raise UserError(
            f"{path} has no learned context (`state_dict` with `ctx`), so it is not a CoOp or CoCoOp checkpoint.",
            exit_status=1,
        )
    epoch = content.get("epoch")
    parameters = {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and name not in _TOKEN_BUFFERS
    }
    bad = [name for name, value in parameters.items() if not value.isfinite().all()]
    if bad:
        raise UserError(
            f"{path} has `{bad[0]}` with values that are not finite: its training diverged, or it was altered; use an "
            "earlier checkpoint.",
            exit_status=1,
        )
    return ReferenceCheckpoint(
        parameters=parameters,
        momentum=_momentum(content.get("optimizer"), parameters),
        epoch=epoch if isinstance(epoch, int) else 0,
        path=path,
    )


def save(
    folder: Path,
    model: ImageClassifier,
    optim: OptimConfig,
    optimizer: dict[str, Any],
    *,
    epochs: int,
    accuracy: float | None = None,
) -> Path:
    """Write ``folder/model.pth.tar-<epochs>`` and the text file ``checkpoint``, as the reference's trainer does.

    The scheduler is stored as plain numbers, which keeps the file readable by ``torch.load`` with its safe default.
    The reference reads such a file of a finished run as it is; to train on from one it needs
    :mod:`cocoop_fast.integrations.dassl`.

    Args:
        folder: ``<output>/prompt_learner``.
        model: its prompt learner's whole state is written, the token buffers included if it has them.
        optim: the recipe.
        optimizer: a torch state dict.
        epochs: trained so far.
        accuracy: of the last evaluation, in percent.

    Returns:
        The checkpoint's path.
    """
    content = {
        "state_dict": OrderedDict(
            (name, tensor.detach().cpu()) for name, tensor in model.prompt_learner.state_dict().items()
        ),
        "epoch": epochs,
        "optimizer": optimizer,
        "scheduler": reference_state(optim, epochs),
        "val_result": accuracy,
    }
    path = folder / f"model.pth.tar-{epochs}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_folder(folder)
    write_atomically(path, lambda file: torch.save(content, file))
    write_atomically(folder / "checkpoint", lambda file: file.write(f"{path.name}\n".encode()))
    return path


def _momentum(optimizer: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """An optimizer's state dict numbers the parameters in the order in which the module, and its state dict, has them."""
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(state, dict) or set(state) != set(range(len(parameters))):
        return None
    found = {}
    for i, (name, value) in enumerate(parameters.items()):
        buffer = state[i].get("momentum_buffer") if isinstance(state[i], dict) else None
        if not isinstance(buffer, Tensor) or buffer.shape != value.shape:
            return None
        found[name] = buffer
    return found


def _find(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"The reference checkpoint {path} does not exist.")
    if path.is_file():
        return path
    for folder in (path, path / "prompt_learner"):
        pointer = folder / "checkpoint"
        if pointer.is_file():
            lines = pointer.read_text(encoding="utf-8", errors="replace").splitlines()
            named = folder / Path(lines[0].strip()).name if lines and lines[0].strip() else folder
            if not named.is_file():
                raise UserError(
                    f"{pointer} names {named.name}, which is not there; pass the checkpoint file itself."
                )
            return named
    raise UserError(
        f"{path} has no file `checkpoint`; pass a `model.pth.tar-N` file or the folder that holds it."
    )
