"""Image features of the training batches, encoded several batches at once and ahead of the steps that use them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import closing, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cocoop_fast.data.batches import Batch, TrainBatches
from cocoop_fast.evaluation.evaluate import autocast
from cocoop_fast.methods.base import ImageClassifier
from cocoop_fast.training.background import in_background

# The image encoder is frozen, so its features do not depend on the steps in between: so many images are encoded
# at a time, since batches of one would leave it mostly idle.
IMAGES_AT_ONCE = 16


class EncodedBatch(NamedTuple):
    """A batch as it was read, on the CPU; its features (B, E) and labels (B,) on the model's device."""

    batch: Batch
    features: Tensor
    label: Tensor


class FeatureSource(Protocol):
    """Where a trainer gets its batches."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[EncodedBatch]:
        """The batches of a 1-based epoch from ``first_batch`` on.

        Raises:
            UserError: an image can no longer be read.
        """


class GivenFeatures:
    """Batches whose image features are there already; no pixels are read.

    Args:
        batches: which samples come when.
        features: (n, E) of all of them.
        device: the model's.
    """

    def __init__(self, batches: TrainBatches, features: Tensor, device: torch.device) -> None:
        self._batches, self._features, self._device = batches, features, device
        self._labels = torch.tensor([sample.label for sample in batches.samples])

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[EncodedBatch]:
        """The batches of a 1-based epoch from ``first_batch`` on."""
        for pick in self._batches.picks(epoch, first_batch):
            sample = torch.tensor(pick)
            batch = Batch(torch.empty(len(pick), 0), self._labels[sample], sample)
            yield EncodedBatch(batch, self._features[sample].to(self._device), batch.label.to(self._device))


@torch.no_grad()
def encode(model: ImageClassifier, image: Tensor, precision: str) -> Tensor:
    """(B, 3, S, S) images on the model's device to (B, E) features."""
    with autocast(precision, image.device):
        features: Tensor = model.image_encoder(image.to(model.dtype))
    return features


class ImageFeatures:
    """The batches of an epoch with their image features.

    On a GPU a group of batches is copied and encoded on a stream of its own, ``groups_ahead`` - 1 groups before its
    first use: while the steps of the group before run, which are small, the encoder fills the GPU. The next batch
    is read between two steps, not all of a group at once. On a CPU a thread reads ``groups_ahead`` groups ahead of the
    steps, and groups are encoded between them: encoder and steps each keep all cores busy, and two of them at once only
    get in each other's way. The features' bits depend on neither.

    Args:
        model: its ``image_encoder`` and ``dtype`` are used.
        batches: what to encode.
        precision: "amp" encodes under autocast.
        device: the model's.
        groups_ahead: groups that are read before the first one is used up; 0: all in the caller's thread and stream.
        thread: whether a thread reads ahead; ``None``: as the device wants it.
    """

    def __init__(
        self,
        model: ImageClassifier,
        batches: TrainBatches,
        precision: str,
        device: torch.device,
        *,
        groups_ahead: int,
        thread: bool | None = None,
    ) -> None:
        self._model = model
        self._batches = batches
        self._precision = precision
        self._device = device
        self._group_size = max(1, IMAGES_AT_ONCE // batches.batch_size)
        self._ahead = groups_ahead * self._group_size
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = groups_ahead > 0 and (self._stream is None if thread is None else thread)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[EncodedBatch]:
        """The batches of a 1-based epoch from ``first_batch`` on.

        Groups are counted from the epoch's start: a resumed run encodes the same groups as an uninterrupted
        one, and so gets the same bits.
        """
        if self._stream is not None:  # what the encoder reads may have been written on the caller's stream
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        first_of_group = first_batch - first_batch % self._group_size
        batches, ahead = self._batches.epoch(epoch, first_of_group), self._ahead
        if self._thread:
            batches, ahead = in_background(batches, ahead), 0
        group: list[Batch] = []
        ready: deque[_Ready] = deque()
        with closing(batches):  # reading ahead stops here, also when the epoch ends early
            for number, batch in enumerate(batches, first_of_group):
                group.append(batch)
                last = number + 1 == len(self._batches)
                if len(group) == self._group_size or last:
                    skip = max(0, first_batch - (number + 1 - len(group)))
                    ready.extend(self._encode(group)[skip:])
                    group = []
                while ready and (last or len(ready) + len(group) > ahead):
                    yield self._hand_over(ready.popleft())

    def _encode(self, group: list[Batch]) -> list[_Ready]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            # Each batch is copied from its own pinned memory: joined on the host first, they would not be pinned.
            image = torch.cat([batch.image.to(self._device, non_blocking=True) for batch in group])
            labels = [batch.label.to(self._device, non_blocking=True) for batch in group]
            features = encode(self._model, image, self._precision)
            done = self._stream.record_event() if self._stream is not None else None
        parts = features.split([len(batch.label) for batch in group])
        return [_Ready(EncodedBatch(*one), done) for one in zip(group, parts, labels, strict=True)]

    def _hand_over(self, ready: _Ready) -> EncodedBatch:
        """Make the caller's stream wait for the encoder's, and tell the allocator that it uses the memory."""
        if ready.done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready.done)
            ready.encoded.features.record_stream(stream)
            ready.encoded.label.record_stream(stream)
        return ready.encoded


class _Ready(NamedTuple):
    encoded: EncodedBatch
    done: torch.cuda.Event | None  # when the encoder's stream is done with it
