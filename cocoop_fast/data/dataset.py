"""What a data set is: samples in three splits, a way to read an image, and the choices that come with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One image of one class.

    ``source`` is what the data set's reader understands: a path relative to its root with ``/`` between
    parts (the same on every machine), or the position of an image in an embedded array.
    """

    source: str | int
    label: int
    classname: str


@dataclass(frozen=True)
class Dataset:
    """Images of named classes. ``label`` of a sample is its class's position in ``classnames``.

    Args:
        name: short name, as in :data:`cocoop_fast.data.registry.REGISTRY`.
        classnames: (K,) names as they enter a prompt: words with spaces.
        train, val, test: samples of the three splits.
        read: decodes one sample to an RGB image, or raises ``ImageError``. It can be pickled,
            because data loading workers call it.
        where: a few words or a path that tell a user where the images come from.
        crop_scale, flip: the training transform's defaults for these images.
        template: the default zero-shot prompt.
    """

    name: str
    classnames: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    read: Callable[[Sample], Image]
    where: str = ""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    template: str = "a photo of a {}."

    def with_splits(
        self,
        *,
        classnames: tuple[str, ...] | None = None,
        train: tuple[Sample, ...] | None = None,
        val: tuple[Sample, ...] | None = None,
        test: tuple[Sample, ...] | None = None,
    ) -> Dataset:
        """A copy with some of the splits (and the class list) replaced."""
        return replace(
            self,
            classnames=self.classnames if classnames is None else classnames,
            train=self.train if train is None else train,
            val=self.val if val is None else val,
            test=self.test if test is None else test,
        )
