"""What a data set is: samples in three splits, a way to read an image, and the choices that come with it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image

from cocoop_fast.config import Subset
from cocoop_fast.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One image of one class.

    ``source`` is what the data set's reader understands: a path relative to its root with ``/`` between
    parts (the same on every machine), or the position of an image in an embedded array.
    """

    source: str | int
    label: int
    classname: str


class Splits(NamedTuple):
    """Samples as they are read, before class names are made fit for a prompt."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]


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
        few_shot_dir: where few-shot samples of these images are looked for; ``None``: nowhere.
        crop_scale, flip: the training transform's defaults for these images.
        template: the default zero-shot prompt.
        subset: the classes that are trained on by default: "base" (the paper's main experiment), or "all".
        notes: what a user should know of how the data were understood, a sentence each: what was left out, what
            looks wrong.
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
    subset: Subset = "base"
    few_shot_dir: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def test_only(self) -> bool:
        """Whether there is nothing to train on, as in the variants of ImageNet."""
        return not self.train

    @property
    def folder(self) -> Path | None:
        """What the samples' sources are relative to; ``None`` for embedded images."""
        return getattr(self.read, "root", None)

    def images_of_classes(self, samples: tuple[Sample, ...]) -> tuple[int, ...]:
        """How many of these samples each class has; (K,)."""
        found = Counter(sample.label for sample in samples)
        return tuple(found[k] for k in range(len(self.classnames)))

    @property
    def val_is_test(self) -> bool:
        """Whether the test images validate as well, as in ImageNet."""
        return bool(self.test) and self.val == self.test

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


_INVISIBLE = str.maketrans(
    "", "", "\u200b\u2060\ufeff"
)  # spaces of no width, which copying from web pages brings


def plain(text: str) -> str:
    """A name as one sees it: letters with accents are single characters (Unicode's form NFC), however the disk or a file
    has them; spaces are single, and those of no width are none."""
    return " ".join(unicodedata.normalize("NFC", text.translate(_INVISIBLE)).split())


def prompt_name(name: str) -> str:
    """A class name as it enters a prompt: :func:`plain`, and ``_`` is a space, as in the reference."""
    return plain(name.replace("_", " "))


def named_classes(splits: Splits, where: str) -> tuple[tuple[str, ...], Splits]:
    """The class list of samples, and the samples with names as they enter a prompt.

    Two classes may share a name, as a crane and a crane do in ImageNet.

    Args:
        where: the file or directory, for messages.

    Raises:
        UserError: labels that are not 0, 1, ..., K-1, two names for one label, or a name without letters.
    """
    names: dict[int, str] = {}
    for sample in (*splits.train, *splits.val, *splits.test):
        known = names.setdefault(sample.label, sample.classname)
        if known != sample.classname:
            raise UserError(
                f"{where}: label {sample.label} is both {known!r} and {sample.classname!r} ({sample.source}).",
                exit_status=1,
            )
    if sorted(names) != list(range(len(names))):
        gap = next(label for label in range(len(names) + 1) if label not in names)
        raise UserError(
            f"{where}: no image has the label {gap}, but labels go up to {max(names, default=-1)}; they must be "
            "0, 1, 2, ... without a gap.",
            exit_status=1,
        )
    shown = {label: prompt_name(name) for label, name in names.items()}
    for label, name in shown.items():
        if not name:
            raise UserError(
                f"{where}: the class name {names[label]!r} has no letters once `_` is read as a space.",
                exit_status=1,
            )

    def rename(samples: Iterable[Sample]) -> tuple[Sample, ...]:
        return tuple(Sample(sample.source, sample.label, shown[sample.label]) for sample in samples)

    return tuple(shown[label] for label in range(len(shown))), Splits(*map(rename, splits))
