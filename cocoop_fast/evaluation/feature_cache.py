"""Features of test images on disk: a frozen image encoder gives the same ones to every method and seed.

A file holds one data set's test images, all classes of them, under one image encoder. Its name has a digest of
all that decides its content: the encoder's weights and structure, the precision, the transform, and the list of
images with their sizes and times of change. What is stale is therefore never found; what is torn or altered
fails the digest of its content, and is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.evaluation.evaluate import Features, test_transform
from cocoop_fast.files import write_atomically
from cocoop_fast.load_clip import LoadedClip

_VERSION = 1  # of the file format and of how images are decoded
_WEIGHT_DIGESTS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # hashing a ViT-B/16 takes 0.2 s


@dataclass(frozen=True)
class TestFeatures:
    """Test images that can be read, and what the image encoder makes of them, in the same order.

    Args:
        samples: n samples, labelled over all classes.
        image: (n, E) features on the CPU, in the model's dtype; mapped from the file, not read into memory.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    samples: tuple[Sample, ...]
    image: Tensor

    def select(self, samples: Sequence[Sample], device: torch.device) -> Features:
        """Features of some of the images, with the labels that these samples have."""
        row = {sample.source: i for i, sample in enumerate(self.samples)}
        rows = torch.tensor([row[sample.source] for sample in samples])
        labels = torch.tensor([sample.label for sample in samples])
        return Features(self.image[rows].to(device), labels)


class FeatureCache:
    """A folder of feature files. Several processes may use it at once.

    Args:
        folder: made when the first file is written.
        on_message: told when a file is damaged.
    """

    def __init__(self, folder: Path, on_message: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self._on_message = on_message or (lambda text: None)

    def find(self, clip: LoadedClip, dataset: Dataset) -> TestFeatures | None:
        """What is cached of the test images of a data set; ``None`` if nothing, or nothing intact."""
        return self._read(self._path(clip, dataset), dataset)

    def find_or_make(
        self,
        clip: LoadedClip,
        dataset: Dataset,
        readable: tuple[Sample, ...],
        encode: Callable[[tuple[Sample, ...]], Tensor],
    ) -> TestFeatures:
        """The same, made first if need be.

        Args:
            clip: whose image encoder it is.
            dataset: all classes, its test images as listed, including those that cannot be read.
            readable: those of them that can be, in their order.
            encode: from samples to features (n, E).
        """
        path = self._path(clip, dataset)
        found = self._read(path, dataset)
        if found is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            found = self._read(path, dataset)  # another process may have made it in the meantime
            if found is None:
                found = TestFeatures(readable, encode(readable).cpu().contiguous())
                self._write(path, dataset, found)
        return found

    def _path(self, clip: LoadedClip, dataset: Dataset) -> Path:
        return self.folder / f"{dataset.name}-{_key(clip, dataset)[:24]}.safetensors"

    def _read(self, path: Path, dataset: Dataset) -> TestFeatures | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                image, rows = file.get_tensor("image"), file.get_tensor("rows")
        except (SafetensorError, OSError) as error:
            self._discard(path, str(error))
            return None
        if metadata.get("content") != _content_digest(image, rows):
            self._discard(path, "its content was altered")
            return None
        return TestFeatures(tuple(dataset.test[row] for row in rows.tolist()), image)

    def _discard(self, path: Path, reason: str) -> None:
        self._on_message(f"The feature file {path} is damaged ({reason}); it is made again.")
        with suppress(OSError):
            path.unlink()

    def _write(self, path: Path, dataset: Dataset, features: TestFeatures) -> None:
        position = {sample.source: i for i, sample in enumerate(dataset.test)}
        rows = torch.tensor([position[sample.source] for sample in features.samples])
        content = _content_digest(features.image, rows)
        data = save({"image": features.image, "rows": rows}, {"content": content, "dataset": dataset.name})
        write_atomically(path, lambda file: file.write(data))


def _key(clip: LoadedClip, dataset: Dataset) -> str:
    """A digest of all that decides the features."""
    digest = hashlib.sha256()
    decides = [_VERSION, _weights_digest(clip), clip.precision, repr(test_transform(clip)), dataset.name]
    digest.update(json.dumps(decides).encode())
    root = getattr(dataset.read, "root", None)  # images in files have one, embedded images have not
    for sample in dataset.test:
        digest.update(f"{sample.source}\t{_state(root, sample)}\n".encode())
    return digest.hexdigest()


def _state(root: Path | None, sample: Sample) -> str:
    """Changes when an image's file does; "" for embedded images and for files that are not there."""
    if root is None:
        return ""
    try:
        stat = (root / str(sample.source)).stat()
    except OSError:
        return ""
    return f"{stat.st_size}\t{stat.st_mtime_ns}"


def _weights_digest(clip: LoadedClip) -> str:
    """Of the image tower: its structure (which activation, how many heads) and every tensor, byte for byte."""
    visual = cast(nn.Module, clip.model.visual)
    if visual not in _WEIGHT_DIGESTS:
        digest = hashlib.sha256(f"{clip.name}\n{visual!r}".encode())
        for name, value in sorted(visual.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
        _WEIGHT_DIGESTS[visual] = digest.hexdigest()
    return _WEIGHT_DIGESTS[visual]


def _content_digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    # As bytes, because NumPy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process makes the same file. The lock goes with the process, even a killed one."""
    with open(path, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, and file systems without locks: the work is done twice
            pass
        yield
