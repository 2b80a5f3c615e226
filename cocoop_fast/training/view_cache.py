"""Image features of N fixed augmented views of each training image, kept on disk.

Epoch e shows view (e - 1) mod N. A view is encoded when an epoch first asks for it, in one pass over all images; after
that, nothing is decoded, augmented or encoded any more. It has the crops that epoch ``view + 1`` has without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.evaluation.feature_cache import feature_key
from cocoop_fast.files.tensors import TensorFiles, Tensors
from cocoop_fast.methods.base import ImageClassifier
from cocoop_fast.training.features import IMAGES_AT_ONCE, EncodedBatch, GivenFeatures, encode


class CachedViews:
    """Batches with image features, as :class:`ImageFeatures` gives them, but of views that come again. No pixels are read.

    Args:
        model: its ``image_encoder`` and ``dtype`` are used.
        clip: the CLIP in it.
        batches: what to encode.
        views: N, at least one.
        folder: of the files, one a view. Processes may share it.
        on_message: told when a file is damaged, before it is made again.
    """

    def __init__(
        self,
        model: ImageClassifier,
        clip: LoadedClip,
        batches: TrainBatches,
        views: int,
        folder: Path,
        on_message: Callable[[str], None],
    ) -> None:
        self._model = model
        self._clip = clip
        self._batches = batches
        self._views = views
        self._files = TensorFiles(folder, on_message, parents=False)
        self._opened: dict[int, Tensor] = {}

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[EncodedBatch]:
        """The batches of a 1-based epoch from ``first_batch`` on."""
        self._batches.picks(epoch)  # refuses a data set without images
        view = self._view((epoch - 1) % self._views)
        yield from GivenFeatures(self._batches, view, self._clip.device).epoch(epoch, first_batch)

    def _view(self, view: int) -> Tensor:
        """(n, E) features of all samples on the CPU, mapped from their file."""
        if view not in self._opened:
            batches = self._batches
            draws = (batches.transform, batches.seed, view)
            key = feature_key(self._clip, batches.dataset, batches.samples, draws)
            tensors = self._files.find_or_make(f"view{view + 1}", key, lambda: self._encode(view))
            self._opened[view] = tensors["image"]
        return self._opened[view]

    def _encode(self, view: int) -> Tensors:
        parts = [
            encode(self._model, batch.image.to(self._clip.device), self._clip.precision).cpu()
            for batch in self._batches.in_order(view + 1, IMAGES_AT_ONCE)
        ]
        return {"image": torch.cat(parts)}
