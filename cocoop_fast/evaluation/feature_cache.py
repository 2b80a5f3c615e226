"""Features of test images on disk: a frozen image encoder gives the same ones to every method and seed.

A file holds one data set's test images, all classes of them, under one image encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.evaluation.evaluate import Features, test_transform
from cocoop_fast.evaluation.feature_key import feature_key
from cocoop_fast.files.tensors import TensorFiles, Tensors


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
