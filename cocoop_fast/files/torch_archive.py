"""Read the tensors of a PyTorch archive without running anything in it.

An archive is a zip file with a pickle, ``data.pkl``, that names tensors and, often enough, objects of arbitrary
classes: ``torch.load`` either refuses those (``weights_only=True``) or runs whatever code the file names. Here an
:class:`InertUnpickler` makes the tensors, and of every other class or function an inert placeholder. TorchScript
archives are such files, too; their code is not looked at. Nor is a part's size believed before its bytes are there.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cocoop_fast.errors import UserError
from cocoop_fast.files.inert_pickle import InertClass, InertObject, InertUnpickler

# A file in the format before PyTorch 1.6 begins with this number.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# Tensors that are not contiguous are copied; together they may take so many times the file's size.
_MAX_COPIES = 4
_MAX_AXES = 64  # as torch's own operations
# Of the weights in a module: how deep in other modules, how long with its names before it, and how many.
_MAX_MODULES, _MAX_NAME, _MAX_WEIGHTS = 64, 1000, 100_000
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


class NumbersNotRead(UnpicklingError):
    """Numbers of a type that no weights need."""


def read_archive(path: Path) -> Any:
    """What a file's pickle holds: containers, numbers, text, tensors on the CPU, and inert objects.

    It takes no more memory than a few times the file's size, and no more time than reading it.

    Raises:
        UserError: the file is in neither of PyTorch's formats.
        NumbersNotRead: it holds complex, quantized or 8-bit floating numbers.
        Exception: of any kind, from a torn or hostile file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_LEGACY)) == _LEGACY:
            return _read_legacy(file, size)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a file that PyTorch wrote, or is not complete.", exit_status=1)
    with zipfile.ZipFile(path) as archive:
        [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        read = [
            i for i in archive.infolist() if i.filename == pickled or i.filename.startswith(f"{folder}data/")
        ]
        if any(i.compress_type != zipfile.ZIP_STORED for i in read) or sum(i.file_size for i in read) > size:
            raise ValueError("compressed archive, or one whose parts overlap")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("numbers with the highest byte first")
        storages = _Storages(lambda key: archive.read(f"{folder}data/{key}"), size)
        return storages.unpickle(io.BytesIO(archive.read(pickled)))


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
    state = dict(weights_of(read_archive(path)))
    if not state:
        raise ValueError("no module with weights in the archive")
    return state


def weights_of(module: InertObject) -> dict[str, Tensor]:
    """Parameters and buffers of a module that was saved as one object, by dotted name.

    TorchScript keeps them among a module's attributes, a pickled module in dictionaries of their own.

    Raises:
        ValueError: there are more, or they lie deeper, than any model has.
    """
    found: dict[str, Tensor] = {}
    left = [(module, "", 0)]
    seen: set[int] = set()  # a hostile file could nest a module in itself
    while left:
        one, prefix, depth = left.pop()
        if not isinstance(one, InertObject) or not isinstance(one.state, Mapping) or id(one) in seen:
            continue
        seen.add(id(one))
        groups = [one.state.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
        inside = [group for group in groups if isinstance(group, Mapping)] or [one.state]
        children = []
        for key, value in (pair for group in inside for pair in group.items()):
            name = f"{prefix}{key}" if isinstance(key, str) else ""
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, InertObject):
                children.append((value, f"{name}.", depth + 1))
            if len(name) > _MAX_NAME or depth > _MAX_MODULES or len(found) > _MAX_WEIGHTS:
                raise ValueError("weights that are too many or lie too deep")
        left += reversed(children)  # in their order
    return found


class _Storages:
    """The storages of a file, each read once, and the tensors in them.

    Args:
        read: of a key: its bytes.
        size: of the file.
    """

    def __init__(self, read: Callable[[str], bytes], size: int) -> None:
        self._read = read
        self._raw: dict[str, bytearray] = {}
        self._may_copy = _MAX_COPIES * size  # bytes

    def unpickle(self, file: BinaryIO) -> Any:
        return InertUnpickler(file, self._known, self._storage).load()

    def _known(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        return _DTYPES.get(name) if module == "torch" else None

    def _storage(self, pid: Any) -> Tensor:
        """("storage", type, key, device, length, ...) to a flat tensor, on the CPU wherever it was saved."""
        kind, storage_type, key, _, length, *view = pid
        if (
            kind == "storage"
            and isinstance(storage_type, InertClass)
            and storage_type.name.endswith("Storage")
        ):
            raise NumbersNotRead(f"numbers of a kind that is not read: {storage_type.name}")
        if kind != "storage" or not isinstance(storage_type, torch.dtype) or any(view):
            raise UnpicklingError(f"unknown storage {str(kind)[:40]!r}")
        if key not in self._raw:
            self._raw[key] = bytearray(self._read(key))
        if not self._raw[key]:
            return torch.empty(0, dtype=storage_type)
        return torch.frombuffer(self._raw[key], dtype=storage_type, count=length)

    def _tensor(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        """A contiguous tensor. (A hostile stride of 0 could make a few bytes look like terabytes.)"""
        if len(size) > _MAX_AXES or math.prod(size) > storage.numel():
            raise UnpicklingError("a tensor is larger than its storage")
        tensor = storage.as_strided(size, stride, offset)
        if not tensor.is_contiguous():
            self._may_copy -= tensor.nbytes
            if self._may_copy < 0:
                raise UnpicklingError("tensors that share their storages too often")
        return tensor.contiguous()


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """The format of PyTorch before 1.6: pickles of version, machine, content and keys, then the storages in that order.

    Of each storage the number of values, 8 bytes, is followed by the values.
    """
    version, machine = InertUnpickler(file).load(), InertUnpickler(file).load()
    if version != 1001 or not machine.get("little_endian"):
        raise ValueError("another version of the format, or numbers with the highest byte first")
    start, widths = file.tell(), {}

    def note_width(pid: Any) -> None:
        widths[pid[2]] = pid[1].itemsize

    InertUnpickler(file, lambda module, name: _DTYPES.get(name) or InertClass(name), note_width).load()
    raw = {}
    for key in InertUnpickler(file).load():
        count = int.from_bytes(file.read(8), "little") * widths[key]
        if count > size - file.tell() or key in raw:
            raise ValueError("file is not complete")
        raw[key] = file.read(count)
    file.seek(start)
    return _Storages(raw.pop, size).unpickle(file)
