"""Read the tensors of a PyTorch archive without running anything in it.

An archive is a zip file with a pickle, ``data.pkl``, that names tensors and, often enough, objects of arbitrary
classes: ``torch.load`` either refuses those (``weights_only=True``) or runs whatever code the file names. Here the
pickle is read by an unpickler that knows tensors and plain containers and turns every other class or function into
an inert placeholder: nothing a file names is imported or called. TorchScript archives are such files, too; their
code is not looked at.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.errors import UserError

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


class NumbersNotRead(pickle.UnpicklingError):
    """Numbers of a type that no weights need."""


def read_archive(path: Path) -> Any:
    """What an archive's pickle holds: containers, numbers, text, tensors on the CPU, and inert objects.

    Raises:
        UserError: the file is not in PyTorch's zip format.
        NumbersNotRead: it holds complex, quantized or 8-bit floating numbers.
        Exception: of any kind, from a torn or hostile file.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not in the zip format that PyTorch writes since version 1.6; if an older PyTorch wrote "
            "it, load and save it once with PyTorch 1.6 or later.",
            exit_status=1,
        )
    with zipfile.ZipFile(path) as archive:
        [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        read = [
            i for i in archive.infolist() if i.filename == pickled or i.filename.startswith(f"{folder}data/")
        ]
        if any(i.compress_type != zipfile.ZIP_STORED for i in read) or archive.testzip() is not None:
            raise ValueError("damaged or compressed archive")
        return _Unpickler(archive, pickled).load()


def is_script_archive(path: Path) -> bool:
    """Whether the file is a TorchScript archive, which holds a module with its code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def script_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive's module by dotted name: its state dict.

    Raises:
        Exception: as :func:`read_archive`; ``ValueError`` if there is no module in it.
    """
    state: dict[str, Tensor] = {}
    _collect(read_archive(path), "", state, set())
    if not state:
        raise ValueError("no module with weights in the archive")
    return state


def _collect(value: Any, name: str, state: dict[str, Tensor], seen: set[int]) -> None:
    if isinstance(value, Tensor):
        state[name] = value
    elif isinstance(value, InertObject) and isinstance(value.state, Mapping) and id(value) not in seen:
        seen.add(id(value))  # once: a hostile file could nest a module in itself
        for key, child in value.state.items():
            _collect(child, f"{name}.{key}" if name else str(key), state, seen)


class InertObject:
    """Stands for an object of any class that a file names. It accepts whatever a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> InertObject:
        return super().__new__(cls)

    state: Any = None  # what the pickle would have restored its attributes from

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    """Reads a torch archive's ``data.pkl``. It imports nothing: names map to the few values below.

    Functions and classes are made anew each time, since a pickle may set attributes on them.
    """

    def __init__(self, archive: zipfile.ZipFile, pickled: str) -> None:
        super().__init__(io.BytesIO(archive.read(pickled)))
        self._archive = archive
        self._folder = pickled.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _rebuild_tensor(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return type(name, (InertObject,), {})

    def persistent_load(self, pid: Any) -> Tensor:
        """("storage", type, key, device, length) to a flat tensor, on the CPU wherever it was saved."""
        kind, storage_type, key, _, length = pid
        if kind == "storage" and str(getattr(storage_type, "__name__", "")).endswith("Storage"):
            raise NumbersNotRead(f"numbers of a kind that is not read: {storage_type.__name__}")
        if kind != "storage" or not isinstance(storage_type, torch.dtype):
            raise pickle.UnpicklingError(f"unknown storage {kind!r}")
        raw = bytearray(self._archive.read(f"{self._folder}data/{key}"))
        if not raw:
            return torch.empty(0, dtype=storage_type)
        return torch.frombuffer(raw, dtype=storage_type, count=length)


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A contiguous tensor. (A hostile stride of 0 could make a few bytes look like terabytes.)"""
    if math.prod(size) > storage.numel():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset).contiguous()
