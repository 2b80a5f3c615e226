"""What a published data set is to this program: one record, and how any such record is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cocoop_fast.config import DataConfig
from cocoop_fast.data.dataset import Dataset, Splits, named_classes
from cocoop_fast.data.images import FileReader
from cocoop_fast.data.listing import misplaced, visible_folders
from cocoop_fast.data.split_file import read_split, write_split
from cocoop_fast.errors import UserError

# A missing split is drawn once and written down. The reference draws it with the seed of whichever run came first;
# here it is always the one that a first run with seed 1 draws.
SPLIT_SEED = 1


@dataclass(frozen=True)
class Part:
    """A file or directory of a data set.

    Args:
        path: below the set's own folder.
        source: where to get it: an address, and a few words if that is not enough.
    """

    path: str
    source: str


@dataclass(frozen=True)
class TorchvisionDownload:
    """How a class of torchvision brings the images.

    Args:
        classname: in ``torchvision.datasets``.
        moves: where it leaves each part below its root -> where the part belongs below the set's folder.
        archives: MD5 sums by address of archives that the class itself would not check.
    """

    classname: str
    moves: tuple[tuple[str, str], ...]
    archives: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class PublishedSet:
    """One data set of the paper's tables, in the directory layout that the reference documents.

    Args:
        name: as in the reference's ``configs/datasets/<name>.yaml``.
        reference_name: its ``DATASET.NAME``.
        title: a line for a listing.
        folder: the set's own directory below ``data.root``.
        images: what the paths of its samples are relative to, below ``folder`` ("" is ``folder``).
        classes: how many there are.
        counts: training, validation and test images of the published split.
        parts: what is always needed.
        read: from ``folder`` to samples without a split file; class names as the reference writes them.
        split: the published split file, for those sets that have one. If it is missing it is made by ``read``.
        raw: what ``read`` needs besides ``parts``.
        listed: whether files name its images, rather than directories alone. Then no link may lead to an image
            outside ``images``, which itself may be a link.
        template: the prompt of zero-shot CLIP (the reference's ``CUSTOM_TEMPLATES``).
        download: ``None`` if torchvision cannot bring the images.
    """

    name: str
    reference_name: str
    title: str
    folder: str
    images: str
    classes: int
    counts: tuple[int, int, int]
    parts: tuple[Part, ...]
    read: Callable[[Path], Splits]
    split: Part | None = None
    raw: tuple[Part, ...] = ()
    listed: bool = True
    template: str = "a photo of a {}."
    download: TorchvisionDownload | None = None

    @property
    def layout(self) -> str:
        """What is looked for below ``data.root``."""
        paths = [part.path for part in (*self.parts, *((self.split,) if self.split else ()))]
        return f"<root>/{self.folder}/{{{', '.join(paths)}}}"


def missing_parts(record: PublishedSet, folder: Path) -> tuple[Part, ...]:
    """What keeps the set from being loaded. The split file counts only if it cannot be made either."""
    missing = [part for part in record.parts if not (folder / part.path).exists()]
    if record.split is not None and not (folder / record.split.path).exists():
        raw = [part for part in record.raw if not (folder / part.path).exists()]
        missing += [record.split, *raw] if raw else []
    return tuple(missing)


def missing(record: PublishedSet, config: DataConfig) -> tuple[str, ...]:
    """The missing parts, as paths below ``data.root``."""
    if config.root is None:
        return (f"data.root: the directory that holds {record.folder}/",)
    return tuple(
        f"{record.folder}/{part.path}" for part in missing_parts(record, config.root / record.folder)
    )


def load(record: PublishedSet, config: DataConfig, *, keep_split: bool = True) -> Dataset:
    """All samples of a published set; no image is opened.

    Args:
        keep_split: a missing split file is made by the reference's algorithm; write it beside the images, as the
            reference does, unless the set is not whole.

    Raises:
        UserError: no root, parts are missing, or a file is not as it should be.
    """
    folder = folder_of(record, config)
    lacking = missing_parts(record, folder)
    if lacking:
        raise UserError(_what_is_missing(record, folder, lacking), exit_status=1)
    split_file = None if record.split is None else folder / record.split.path
    given = split_file is not None and split_file.exists()
    raw = read_split(split_file) if split_file is not None and given else record.read(folder)
    classnames, splits = named_classes(raw, str(split_file if given else folder))
    notes = _unlike_published(record, folder, len(classnames), splits)
    if split_file is not None and not given:
        if notes:
            notes = (f"{notes[0]} The split is drawn from what is there and not kept.",)
        elif keep_split:
            _keep(split_file, raw)
    return Dataset(
        name=record.name,
        classnames=classnames,
        train=splits.train,
        val=splits.val,
        test=splits.test,
        read=FileReader(folder / record.images, confined=record.listed, as_stored=True),
        where=str(folder),
        template=record.template,
        few_shot_dir=folder / "split_fewshot",
        notes=notes,
    )


def _unlike_published(record: PublishedSet, folder: Path, classes: int, splits: Splits) -> tuple[str, ...]:
    """A warning if the set has not the published numbers of classes and images. Splits of other seeds may differ."""
    here, published = sum(map(len, splits)), sum(record.counts)
    if (classes, here) == (record.classes, published):
        return ()
    return (
        f"{folder} is not {record.name} as published: it has {classes:,} classes and {here:,} images, and not "
        f"{record.classes:,} and {published:,}, so results do not compare with published ones; was it downloaded and "
        "unpacked in full?",
    )


def whereabouts(record: PublishedSet, root: Path, lacking: tuple[Part, ...]) -> tuple[str, ...]:
    """Where missing parts lie instead, or may lie, a sentence each."""
    folder = root / record.folder
    if not folder.is_dir():
        names = {record.folder.lower(), record.name, record.reference_name.lower()}
        beside = visible_folders(root) if root.is_dir() else []
        return tuple(f"{one} is there; call it {folder}." for one in beside if one.name.lower() in names)
    sentences = []
    needed = {part.path.partition("/")[0] for part in (*record.parts, *record.raw)}
    for part in lacking:
        found = misplaced(folder, part.path)
        if found is not None:
            sentences.append(f"{part.path} lies at {found} and should lie at {folder / part.path}; move it.")
        elif not Path(part.path).suffix:
            sentences += [
                f"{one} is there, and nothing is looked for in it; if it is {part.path}, call it {folder / part.path}."
                for one in visible_folders(folder)
                if one.name not in needed and visible_folders(one)
            ]
    return tuple(dict.fromkeys(sentences))


def folder_of(record: PublishedSet, config: DataConfig, *, must_exist: bool = True) -> Path:
    """The set's own directory.

    Raises:
        UserError: no root, or no such directory below it.
    """
    if config.root is None:
        raise UserError(
            f"Data set {record.name!r} needs data.root (--root DIR): the directory that holds {record.folder}/."
        )
    folder = config.root / record.folder
    if folder.is_dir() or not must_exist:
        return folder
    if config.root.name == record.folder and config.root.is_dir():
        raise UserError(
            f"There is no {folder}; data.root is the directory above {record.folder}/, so use --root "
            f"{config.root.parent}."
        )
    raise UserError(
        f"There is no {folder}; `cocoop-fast datasets check {record.name} --root {config.root}` says what belongs "
        "there."
    )


def _keep(path: Path, splits: Splits) -> None:
    try:
        write_split(path, splits)
    except OSError as error:  # say, images on a read-only disk; the same split is made again next time
        warnings.warn(f"The split could not be written to {path}: {error.strerror}.", stacklevel=2)


def _what_is_missing(record: PublishedSet, folder: Path, lacking: tuple[Part, ...]) -> str:
    names = ", ".join(part.path for part in lacking)
    hints = "".join(f" {hint}" for hint in whereabouts(record, folder.parent, lacking))
    return (
        f"{folder} lacks {names};{hints} `cocoop-fast datasets check {record.name} --root {folder.parent}` says where to "
        "get what is missing."
    )
