"""Batches of images: in the shuffled order of an epoch for training, in the given order for testing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.data.images import ImageError
from cocoop_fast.data.transforms import TestTransform, TrainTransform, order_generator, view_generator
from cocoop_fast.errors import UserError

# That workers put into a message, where batches are smaller: as many as are encoded at once.
_IMAGES_A_MESSAGE = 16


class Batch(NamedTuple):
    """image (B, 3, S, S) float32; label (B,) int64; sample (B,) int64, positions in the list of samples."""

    image: Tensor
    label: Tensor
    sample: Tensor


@dataclass(frozen=True)
class TrainBatches:
    """The training batches of every epoch.

    Which images a batch holds, and how they are cropped, depends on (seed, epoch, batch) alone. As in the
    reference, an incomplete last batch is dropped, unless it would be the only one.

    Args:
        dataset: its reader is used.
        samples: what is trained on.
        transform: from image and generator to tensor.
        batch_size: B.
        seed: the run's.
        workers: processes that decode ahead; 0 decodes in this one. They change nothing but the speed.
        pin_memory: whether batches go to a GPU.
        share: (i, n): of each batch only the i-th of n equal parts, as they are in the whole.
    """

    dataset: Dataset
    samples: tuple[Sample, ...]
    transform: TrainTransform
    batch_size: int
    seed: int
    workers: int = 0
    pin_memory: bool = False
    share: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return max(1, len(self.samples) // self.batch_size)

    def epoch(self, epoch: int, first_batch: int = 0) -> Generator[Batch, None, None]:
        """The batches of a 1-based epoch from ``first_batch`` on; those before it are not decoded.

        Raises:
            UserError: there are no samples (which is no mistake where nothing is trained), or an image can no
                longer be read.
        """
        return self._views(epoch, self.picks(epoch, first_batch))

    def in_order(self, epoch: int, batch_size: int) -> Generator[Batch, None, None]:
        """All samples in their order, cropped as in an epoch; the last batch may be smaller.

        Raises:
            UserError: as for :meth:`epoch`.
        """
        return self._views(epoch, _consecutive(len(self.samples), batch_size))

    def picks(self, epoch: int, first_batch: int = 0) -> list[list[int]]:
        """Positions of the samples in each batch of a 1-based epoch from ``first_batch`` on.

        Raises:
            UserError: there are no samples.
        """
        if not self.samples:
            raise UserError(f"There are no images to train on in {self.dataset.where}.", exit_status=1)
        order = torch.randperm(len(self.samples), generator=order_generator(self.seed, epoch)).tolist()
        size, (part, parts) = min(self.batch_size, len(order)), self.share
        first, last = size * part // parts, size * (part + 1) // parts
        return [order[i * size + first : i * size + last] for i in range(first_batch, len(self))]

    def _views(self, epoch: int, picks: list[list[int]]) -> Generator[Batch, None, None]:
        views = _TrainViews(self.dataset, self.samples, self.transform, self.seed, epoch)
        return _load(views, picks, self.workers, self.pin_memory)

    def describe(self, sample: Tensor) -> str:
        """The sources of samples (n,), given by their positions, for a message."""
        sources = [str(self.samples[i].source) for i in sample.tolist()]
        more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
        return ", ".join(sources[:3]) + more


def test_batches(
    dataset: Dataset,
    samples: tuple[Sample, ...],
    transform: TestTransform,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """All samples in their order; the last batch may be smaller."""
    picks = _consecutive(len(samples), batch_size)
    return _load(_TestViews(dataset, samples, transform), picks, workers, pin_memory)


test_batches.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest thinks of the name


def _consecutive(n: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


@dataclass(frozen=True)
class _Item:
    """One view, or why there is none: an exception raised in a worker would reach us as a traceback."""

    image: Tensor | None
    label: int
    index: int
    fault: str = ""


@dataclass(frozen=True)
class _TrainViews(TorchDataset[_Item]):
    dataset: Dataset
    samples: tuple[Sample, ...]
    transform: TrainTransform
    seed: int
    epoch: int

    def __getitem__(self, index: int) -> _Item:
        generator = view_generator(self.seed, self.epoch, index)
        return _item(self.dataset, self.samples, index, lambda image: self.transform(image, generator))


@dataclass(frozen=True)
class _TestViews(TorchDataset[_Item]):
    dataset: Dataset
    samples: tuple[Sample, ...]
    transform: TestTransform

    def __getitem__(self, index: int) -> _Item:
        return _item(self.dataset, self.samples, index, self.transform)


def _item(
    dataset: Dataset, samples: tuple[Sample, ...], index: int, transform: Callable[[Image], Tensor]
) -> _Item:
    sample = samples[index]
    try:
        return _Item(transform(dataset.read(sample)), sample.label, index)
    except ImageError as error:
        fault = f"The image {sample.source} in {dataset.where} can no longer be read ({error})"
        return _Item(None, sample.label, index, fault)


class _Message(NamedTuple):
    """What a worker sends: the items in front of the first that cannot be read, and why it cannot."""

    items: Batch | None
    fault: str


def _collate(items: list[_Item]) -> _Message:
    images, fault = [], ""
    for item in items:
        if item.image is None:
            fault = item.fault
            break
        images.append(item.image)
    if not images:
        return _Message(None, fault)
    read = items[: len(images)]
    labels, indices = torch.tensor([item.label for item in read]), torch.tensor([item.index for item in read])
    return _Message(Batch(torch.stack(images), labels, indices), fault)


def _load(
    views: TorchDataset[_Item], picks: list[list[int]], workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    # A message costs milliseconds, whatever is in it: a worker sends several small batches in one. Each gets two at least.
    together = _IMAGES_A_MESSAGE // max(map(len, picks), default=1)
    together = max(1, min(together, len(picks) // (2 * workers))) if workers else 1
    parts = (picks[first : first + together] for first in range(0, len(picks), together))
    messages = [list(chain.from_iterable(part)) for part in parts]
    # The loader draws a seed for its workers, which do not use it; a generator of its own leaves the global
    # one as it was. Workers are started here and not by the first batch, which another thread may ask for: a process
    # had better be forked by the thread that computes.
    loader = DataLoader(
        views,
        batch_sampler=messages,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_run,
    )
    return _readable(iter(loader), list(map(len, picks)))


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to all processes of a run (control-C, a scheduler's) is the run's to heed: it finishes its step, saves,
    and ends its workers."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)


def _readable(messages: Iterator[_Message], sizes: list[int]) -> Generator[Batch, None, None]:
    """Batches of these sizes from messages that hold one or more of them each."""
    following = iter(sizes)
    try:
        for items, fault in messages:
            first = 0
            while items is not None and first < len(items.label):
                end = first + next(following)
                if end > len(items.label):  # one of this batch's cannot be read
                    break
                yield Batch(*(part[first:end] for part in items))
                first = end
            if fault:
                raise UserError(f"{fault}; were files moved or changed during the run?", exit_status=1)
    finally:
        del messages  # and so its workers, although the traceback of an error refers to what is called here
