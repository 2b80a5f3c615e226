"""Tensors that are expensive to make, kept in files that are read only if they are what was asked for.

A file's name has a digest of all that decides its content, so a stale file is never found. Its header has a digest of
the content itself: a damaged or altered file is noticed, reported, and made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cocoop_fast.files.atomic import write_atomically
from cocoop_fast.files.lock import locked

Tensors = Mapping[str, Tensor]


class TensorFiles:
    """A folder of safetensors files. Several processes may use it at once.

    Args:
        folder: made when the first file is written.
        on_message: told when a file is damaged.
        parents: folders above it are made as well. Not so in a run directory, which somebody may have deleted.
    """

    def __init__(
        self, folder: Path, on_message: Callable[[str], None] | None = None, *, parents: bool = True
    ) -> None:
        self.folder = folder
        self._parents = parents
        self._on_message = on_message or (lambda text: None)

    def find(self, name: str, key: str) -> Tensors | None:
        """Tensors by name, on the CPU, mapped from the file instead of read into memory; ``None`` if none are intact.

        Args:
            name: the file's name begins with it.
            key: a digest of all that decides the content, in hexadecimal.
        """
        path = self._path(name, key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                digest = (file.metadata() or {}).get("content")
                tensors = {one: file.get_tensor(one) for one in file.keys()}  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError) as error:
            self._discard(path, str(error))
            return None
        if digest != _content_digest(tensors):
            self._discard(path, "its content was altered")
            return None
        return tensors

    def find_or_make(self, name: str, key: str, make: Callable[[], Tensors]) -> Tensors:
        """The same, made first if need be, while other processes that want the same file wait.

        Args:
            name, key: as for :meth:`find`.
            make: the tensors, on the CPU and contiguous.
        """
        found = self.find(name, key)
        if found is not None:
            return found
        path = self._path(name, key)
        self.folder.mkdir(parents=self._parents, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            found = self.find(name, key)  # another process may have made it in the meantime
            if found is None:
                found = make()
                data = save(dict(found), {"content": _content_digest(found), "made for": name})
                write_atomically(path, lambda file: file.write(data))
        return found

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key[:24]}.safetensors"

    def _discard(self, path: Path, reason: str) -> None:
        self._on_message(f"The feature file {path} is damaged ({reason}); it is made again.")
        with suppress(OSError):
            path.unlink()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements, for a digest. As bytes, because NumPy has no bfloat16."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _content_digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
