"""Features of test images on disk: a frozen image encoder gives the same ones to every method and seed.

A file holds one data set's test images, all classes of them, under one image encoder. Its name has a digest of all that
decides them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.evaluation.evaluate import Features, test_transform
from cocoop_fast.files.tensors import TensorFiles, Tensors, tensor_bytes

_VERSION = 3  # of the files' format and of how images are decoded
_WEIGHT_DIGESTS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # hashing a ViT-B/16 takes 0.2 s


@dataclass(frozen=True)
class TestFeatures:
    """Test images that can be read, and what the image encoder makes of them, in the same order.

    Args:
        samples: n samples, labelled over all classes.
        image: (n, E) features on the CPU, in the model's dtype; mapped from the file, not read into memory.
    """

    __test__ = False  # pytest goes by the name, and this is not a test

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
        self._files = TensorFiles(folder, on_message)

    @property
    def folder(self) -> Path:
        return self._files.folder

    def find(self, clip: LoadedClip, dataset: Dataset) -> TestFeatures | None:
        """What is cached of the test images of a data set; ``None`` if nothing, or nothing intact."""
        found = self._files.find(dataset.name, _key(clip, dataset))
        return None if found is None else _from_tensors(found, dataset)

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

        def make() -> Tensors:
            position = {sample.source: i for i, sample in enumerate(dataset.test)}
            rows = torch.tensor([position[sample.source] for sample in readable])
            return {"image": encode(readable).cpu().contiguous(), "rows": rows}

        return _from_tensors(self._files.find_or_make(dataset.name, _key(clip, dataset), make), dataset)


def _key(clip: LoadedClip, dataset: Dataset) -> str:
    return feature_key(clip, dataset, dataset.test, test_transform(clip))


def _from_tensors(tensors: Tensors, dataset: Dataset) -> TestFeatures:
    return TestFeatures(tuple(dataset.test[row] for row in tensors["rows"].tolist()), tensors["image"])


def feature_key(clip: LoadedClip, dataset: Dataset, samples: Sequence[Sample], transform: object) -> str:
    """The encoder's weights and structure, the precision, the transform, the images with their sizes and times of change.

    Args:
        clip: whose image encoder it is.
        dataset: its name and its reader's folder enter.
        samples: the images in their order; labels do not enter.
        transform: a dataclass, or anything else whose ``repr`` says all about it, the random draws included.
    """
    digest = hashlib.sha256()
    decides = [_VERSION, _weights_digest(clip), clip.precision, repr(transform), dataset.name]
    digest.update(json.dumps(decides).encode())
    for sample in samples:
        digest.update(f"{sample.source}\t{_state(dataset.folder, sample)}\n".encode())
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
            digest.update(tensor_bytes(value))
        _WEIGHT_DIGESTS[visual] = digest.hexdigest()
    return _WEIGHT_DIGESTS[visual]
