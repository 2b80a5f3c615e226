"""What of a data set is on the disk, and how it compares with what was published."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from cocoop_fast.config import DataConfig
from cocoop_fast.data.dataset import Dataset
from cocoop_fast.data.images import FileReader
from cocoop_fast.data.listing import misplaced
from cocoop_fast.data.registry import REGISTRY, canonical_name
from cocoop_fast.data.sets import SETS, record
from cocoop_fast.data.sets.record import Part, PublishedSet


class Counts(NamedTuple):
    """Numbers of classes and images."""

    classes: int
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
        absent: images that are listed and not there.
        notes: what a user should know of how the data were understood.
    """

    parts: tuple[tuple[Part, bool], ...]
    complete: bool
    as_published: bool
    counts: Counts | None
    published: Counts | None
    absent: tuple[str, ...]
    notes: tuple[str, ...] = ()


def take_inventory(config: DataConfig) -> Inventory:
    """Look for the parts of a data set; if they are there, read its lists and look for every image.

    Nothing is written, and no image is opened.

    Raises:
        UserError: an unknown name, no root, or lists that are not as they should be.
    """
    name = canonical_name(config.name)
    published = SETS.get(name)
    parts: tuple[tuple[Part, bool], ...] = ()
    complete = True
    if published is not None:
        parts, complete = _parts(published, config)
    read = REGISTRY[name].load if published is None else partial(record.load, published, keep_split=False)
    dataset = read(config) if complete else None
    counts = None if dataset is None else _count(dataset)
    expected = None if published is None else Counts(published.classes, *published.counts)
    absent = () if dataset is None else _absent(dataset)
    notes = () if dataset is None else dataset.notes
    if published is not None and config.root is not None:
        lacking = record.missing_parts(published, config.root / published.folder)
        notes += record.whereabouts(published, config.root, lacking)
    return Inventory(
        parts=parts,
        complete=complete,
        as_published=counts is None or expected is None or _same_size(counts, expected),
        counts=counts,
        published=expected,
        absent=absent,
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


def _absent(dataset: Dataset) -> tuple[str, ...]:
    if not isinstance(dataset.read, FileReader):
        return ()
    root = dataset.read.root
    sources = dict.fromkeys(str(sample.source) for sample in (*dataset.train, *dataset.val, *dataset.test))
    return tuple(source for source in sources if not (root / source).is_file())
