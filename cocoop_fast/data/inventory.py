"""What of a data set is on the disk, and how it compares with what was published."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from cocoop_fast.config import DataConfig
from cocoop_fast.data.check import look_at_images
from cocoop_fast.data.dataset import Dataset
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.data.images import MISSING, FileReader
from cocoop_fast.data.listing import misplaced
from cocoop_fast.data.registry import canonical_name, load_dataset
from cocoop_fast.data.sets import SETS, record
from cocoop_fast.data.sets.record import Part, PublishedSet
from cocoop_fast.errors import UserError

MOST_OPENED = 100_000


class Counts(NamedTuple):
    """Numbers of classes and images."""

    classes: int
    train: int
    val: int
    test: int


class ClassCounts(NamedTuple):
    """A class and its numbers of images."""

    name: str
    train: int
    val: int
    test: int


@dataclass(frozen=True)
class Inventory:
    """What was found.

    Args:
        parts: of a published set, each with whether it is there. The raw lists are named only while the split
            file that replaces them is not there.
        complete: nothing that is needed to read the lists is missing.
        as_published: a published set has the published numbers of classes and images.
        counts: ``None`` if the set is not complete.
        published: ``None`` for a set of one's own.
        classes: of each class, its images by split.
        absent: images that are listed and not there.
        unreadable: images that are there and cannot be read, with the reason.
        notes: what a user should know of how the data were understood.
    """

    parts: tuple[tuple[Part, bool], ...]
    complete: bool
    as_published: bool
    counts: Counts | None
    published: Counts | None
    classes: tuple[ClassCounts, ...]
    absent: tuple[str, ...]
    unreadable: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Nothing is missing, all can be read, and a published set is as it was published."""
        return self.complete and self.as_published and not self.absent and not self.unreadable


def take_inventory(config: DataConfig) -> Inventory:
    """Look for the parts of a data set; if they are there, read its lists and open every image, as training does.

    Nothing is written. Of a set of more than :data:`MOST_OPENED` images none is opened.

    Raises:
        UserError: an unknown name, no root, or lists that are not as they should be.
    """
    name = canonical_name(config.name)
    published = SETS.get(name)
    parts: tuple[tuple[Part, bool], ...] = ()
    complete = True
    if published is not None:
        parts, complete = _parts(published, config)
    read = load_dataset if published is None else partial(record.load, published, keep_split=False)
    dataset = read(config) if complete else None
    counts = None if dataset is None else _count(dataset)
    expected = None if published is None else Counts(published.classes, *published.counts)
    absent, unreadable, seen = ((), {}, ()) if dataset is None else _look(dataset)
    notes = () if dataset is None else (*dataset.notes, *seen, *_without_halves(dataset))
    if published is not None and config.root is not None:
        lacking = record.missing_parts(published, config.root / published.folder)
        notes += record.whereabouts(published, config.root, lacking)
    return Inventory(
        parts=parts,
        complete=complete,
        as_published=counts is None or expected is None or _same_size(counts, expected),
        counts=counts,
        published=expected,
        classes=() if dataset is None else _count_classes(dataset),
        absent=absent,
        unreadable=unreadable,
        notes=(*notes, *_where_images_are(dataset, absent)),
    )


def _same_size(counts: Counts, published: Counts) -> bool:
    """Splits of other seeds than the published one may cut a class otherwise."""
    return counts.classes == published.classes and sum(counts[1:]) == sum(published[1:])


def _where_images_are(dataset: Dataset | None, absent: tuple[str, ...]) -> tuple[str, ...]:
    """Where the first image that is not there lies instead."""
    if dataset is None or not absent or not isinstance(dataset.read, FileReader):
        return ()
    found = misplaced(dataset.read.root, absent[0])
    if found is None:
        return ()
    return (
        f"{absent[0]} lies at {found} and should lie at {dataset.read.root / absent[0]}; move the folder's content.",
    )


def _parts(published: PublishedSet, config: DataConfig) -> tuple[tuple[tuple[Part, bool], ...], bool]:
    folder = record.folder_of(published, config, must_exist=False)
    wanted = list(published.parts)
    if published.split is not None:
        wanted.append(published.split)
        if not (folder / published.split.path).exists():
            wanted += published.raw
    parts = tuple((part, (folder / part.path).exists()) for part in wanted)
    return parts, not record.missing_parts(published, folder)


def _count(dataset: Dataset) -> Counts:
    return Counts(len(dataset.classnames), len(dataset.train), len(dataset.val), len(dataset.test))


def _count_classes(dataset: Dataset) -> tuple[ClassCounts, ...]:
    splits = (dataset.train, dataset.val, dataset.test)
    counts = [Counter(sample.label for sample in split) for split in splits]
    return tuple(
        ClassCounts(name, *(count[label] for count in counts))
        for label, name in enumerate(dataset.classnames)
    )


def _look(dataset: Dataset) -> tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]:
    """Images that are not there, images that cannot be read, and what is to be said of those that can."""
    samples = dict.fromkeys((*dataset.train, *dataset.val, *dataset.test))
    if len(samples) > MOST_OPENED and isinstance(dataset.read, FileReader):
        root = dataset.read.root
        absent = tuple(str(one.source) for one in samples if not (root / str(one.source)).is_file())
        note = f"None of the {len(samples):,} images was opened; training opens those that it uses."
        return absent, {}, (note,)
    seen = look_at_images(dataset)
    faults = {str(sample.source): fault for sample, fault in seen.bad.items()}
    unreadable = {source: fault for source, fault in faults.items() if fault != MISSING}
    return tuple(source for source in faults if source not in unreadable), unreadable, seen.notes


def _without_halves(dataset: Dataset) -> tuple[str, ...]:
    """Of few classes that training needs to be told so."""
    try:
        select_classes(dataset, "base")
    except UserError as error:
        return (str(error),)
    return ()
