"""Your own images: one folder a class, with or without train/, val/ and test/ above the classes."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.config import DataConfig
from cocoop_fast.data.dataset import Dataset, Sample, prompt_name
from cocoop_fast.data.images import FileReader
from cocoop_fast.data.listing import visible_folders
from cocoop_fast.data.split import split_by_class
from cocoop_fast.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"})
_ADVICE = "expected <root>/<class>/<image> or <root>/train/<class>/<image> with a test/ folder beside train/"


def missing(config: DataConfig) -> tuple[str, ...]:
    """What keeps this data set from being loaded, in a user's words."""
    if config.root is None:
        return ("data.root: a directory of class folders",)
    return () if config.root.is_dir() else (str(config.root),)


def load(config: DataConfig) -> Dataset:
    """List the images below ``data.root``; none is opened.

    Class names are folder names with ``_`` for a space, in sorted order. Hidden files and folders, and files
    that are not images by extension, are ignored. Without train/ and test/ folders each class is split
    50/20/30. A set with train/ and val/ alone is tested on val/.

    Raises:
        UserError: no such directory, no classes, one class only, a class without images, two folders of one
            name, a test class that is not in train/.
    """
    if config.root is None:
        raise UserError(
            "Data set 'folder' needs data.root (--root DIR): a directory with one folder a class."
        )
    root = config.root
    if not root.exists():
        raise UserError(f"The data directory {root} does not exist.")
    if not root.is_dir():
        raise UserError(f"The data directory {root} is a file; {_ADVICE}.")
    splits = _split_folders(root)
    classnames = _classes(splits.get("train", root))
    if "train" in splits:
        train = _samples(root, splits["train"], classnames)
        val = _samples(root, splits["val"], classnames) if "val" in splits else ()
        test = _samples(root, splits["test"], classnames) if "test" in splits else val
    else:
        train, val, test = split_by_class(_samples(root, root, classnames))
    return Dataset(
        name="folder",
        classnames=tuple(classnames.values()),
        train=train,
        val=val,
        test=test,
        read=FileReader(root),
        where=str(root),
    )


def _split_folders(root: Path) -> dict[str, Path]:
    """The train/, val/ and test/ folders, or nothing if ``root`` holds the classes themselves.

    A folder called "train" may be a class of vehicles: it is a split only if it holds folders itself.
    """
    found = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    holds_classes = {name: bool(visible_folders(path)) for name, path in found.items()}
    if not any(holds_classes.values()):
        return {}
    if not holds_classes.get("train"):
        raise UserError(f"{root} has {'/ and '.join(found)}/ but no train/ with class folders; {_ADVICE}.")
    if not (holds_classes.get("test") or holds_classes.get("val")):
        raise UserError(
            f"{root} has train/ but no test/ (or val/) with class folders, so there is nothing to test on."
        )
    return {name: path for name, path in found.items() if holds_classes[name]}


def _classes(folder: Path) -> dict[str, str]:
    """Folder name -> class name, sorted by folder name."""
    folders = visible_folders(folder)
    if not folders:
        raise UserError(f"{folder} has no class folders; {_ADVICE}.")
    if len(folders) == 1:
        raise UserError(f"{folder} has one class folder ({folders[0].name}); a classifier needs two or more.")
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path in folders:
        name = prompt_name(path.name)
        if not name:
            raise UserError(
                f"The class folder {path} has no name left once `_` is read as a space; rename it."
            )
        if name in taken:
            raise UserError(
                f"The class folders {taken[name]!r} and {path.name!r} in {folder} both mean {name!r}."
            )
        taken[name] = path.name
        names[path.name] = name
    return names


def _samples(root: Path, folder: Path, classnames: dict[str, str]) -> tuple[Sample, ...]:
    labels = {name: label for label, name in enumerate(classnames)}
    samples: list[Sample] = []
    for path in visible_folders(folder):
        if path.name not in labels:
            raise UserError(f"Class {path.name!r} is in {folder} but not among the classes to train on.")
        images = _images(path)
        if not images:
            known = ", ".join(sorted(EXTENSIONS))
            raise UserError(
                f"The class folder {path} has no images (files ending in {known}).", exit_status=1
            )
        samples += [
            Sample(image.relative_to(root).as_posix(), labels[path.name], classnames[path.name])
            for image in images
        ]
    return tuple(samples)


def _images(folder: Path) -> list[Path]:
    """Image files at any depth, sorted by their parts: the same order on every machine."""
    return sorted(
        (
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in EXTENSIONS
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.is_file()
        ),
        key=lambda path: path.parts,
    )
