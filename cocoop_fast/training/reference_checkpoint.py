"""Read and write the reference implementation's checkpoints (``prompt_learner/model.pth.tar-N``).

The reference pickles its learning-rate scheduler object into the file, so ``torch.load`` either refuses it
(``weights_only=True``) or runs whatever code the file names. Here the pickle is read by an unpickler that
knows tensors and plain containers and turns every other class or function into an inert placeholder: nothing
a file names is imported or called.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.config import OptimConfig
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.classifier import PromptClassifier
from cocoop_fast.files import write_atomically
from cocoop_fast.training.schedule import learning_rate

_TOKEN_BUFFERS = ("token_prefix", "token_suffix")  # constants of CLIP and the class names
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What can be used of the reference's file.

    ``parameters`` are the learned ones by name: ``ctx`` (M, d) and, for CoCoOp, ``meta_net.linear1.weight``
    and so on. ``epoch`` is the number of epochs trained.
    """

    parameters: dict[str, Tensor]
    epoch: int
    path: Path


def load(path: Path) -> ReferenceCheckpoint:
    """Read a checkpoint without running anything in it.

    Args:
        path: the file, or the folder with the text file ``checkpoint`` that names it (the reference's output
            directory, or its ``prompt_learner`` folder).

    Raises:
        UserError: missing, damaged, in the format of PyTorch before 1.6, or without a learned context.
    """
    path = _find(path)
    try:
        content = _read(path)
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
    return ReferenceCheckpoint(
        parameters={
            name: value
            for name, value in state.items()
            if isinstance(value, Tensor) and name not in _TOKEN_BUFFERS
        },
        epoch=epoch if isinstance(epoch, int) else 0,
        path=path,
    )


def save(
    folder: Path,
    model: PromptClassifier,
    optim: OptimConfig,
    optimizer: dict[str, Any],
    accuracy: float | None,
) -> Path:
    """Write ``folder/model.pth.tar-<epochs>`` and the text file ``checkpoint``, as the reference's trainer does.

    The scheduler is stored as plain numbers, which the reference's resume accepts, and which keeps the file
    readable by ``torch.load`` with its safe default.

    Args:
        folder: ``<output>/prompt_learner``.
        model: its prompt learner's whole state is written, the token buffers included if it has them.
        optim: resolved.
        optimizer: a torch state dict.
        accuracy: of the last evaluation, in percent.

    Returns:
        The checkpoint's path.
    """
    epochs = optim.epochs or 0
    rate = learning_rate(optim, epochs + 1)
    content = {
        "state_dict": OrderedDict(
            (name, tensor.detach().cpu()) for name, tensor in model.prompt_learner.state_dict().items()
        ),
        "epoch": epochs,
        "optimizer": optimizer,
        "scheduler": {
            "base_lrs": [optim.lr],
            "last_epoch": epochs,
            "_step_count": epochs + 1,
            "_last_lr": [rate],
        },
        "val_result": accuracy,
    }
    path = folder / f"model.pth.tar-{epochs}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(content, file))
    write_atomically(folder / "checkpoint", lambda file: file.write(f"{path.name}\n".encode()))
    return path


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


def _read(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not in the zip format that PyTorch writes since version 1.6; if an older PyTorch wrote "
            "it, load and save it once with PyTorch 1.6 or later.",
            exit_status=1,
        )
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None or any(
            i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()
        ):
            raise ValueError("damaged or compressed archive")
        [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return _Unpickler(archive, pickled).load()


class _Placeholder:
    """Stands for an object of any class that a file names. It accepts whatever a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _Function:
    """A function that a pickle may call but not modify."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Tensor:
        return self._call(*args)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


class _Unpickler(pickle.Unpickler):
    """Reads a torch archive's ``data.pkl``. It imports nothing: names map to the few values below."""

    def __init__(self, archive: zipfile.ZipFile, pickled: str) -> None:
        super().__init__(io.BytesIO(archive.read(pickled)))
        self._archive = archive
        self._folder = pickled.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Function(_rebuild_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Function(_rebuild_parameter)
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        return type(name, (_Placeholder,), {})  # a new class each time: a pickle may set attributes on it

    def persistent_load(self, pid: Any) -> Tensor:
        """("storage", type, key, device, length) to a flat tensor, on the CPU wherever it was saved."""
        kind, storage_type, key, _, length = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"unknown storage {kind!r}")
        raw = bytearray(self._archive.read(f"{self._folder}data/{key}"))
        if not raw:
            return torch.empty(0, dtype=storage_type.dtype)
        return torch.frombuffer(raw, dtype=storage_type.dtype, count=length)


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A contiguous tensor. (A hostile stride of 0 could make a few bytes look like terabytes.)"""
    if math.prod(size) > storage.numel():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset).contiguous()


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data
