"""Your own images: one folder a class, with or without folders of splits above the classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cocoop_fast.config import DataConfig
from cocoop_fast.data.class_names import note_on_gaps, note_on_names, read_class_names
from cocoop_fast.data.dataset import Dataset, Sample, Splits, prompt_name
from cocoop_fast.data.duplicates import look_for_duplicates
from cocoop_fast.data.images import FileReader, endings
from cocoop_fast.data.listing import (
    holds_runs,
    is_hidden,
    natural_order,
    refuse_undecodable,
    visible_files,
    visible_folders,
)
from cocoop_fast.data.split import split_by_class
from cocoop_fast.data.split_names import looks_like_split, split_of
from cocoop_fast.errors import UserError

_ADVICE = "expected <root>/<class>/<image> or <root>/train/<class>/<image> with a test/ folder beside train/"
_REMEDY = "give them names with --class-names FILE, in lines `folder name`"
_SHOWN = 3


def missing(config: DataConfig) -> tuple[str, ...]:
    """What keeps this data set from being loaded, in a user's words."""
    if config.root is None:
        return ("data.root: a directory of class folders",)
    return () if config.root.is_dir() else (str(config.root),)


def load(config: DataConfig) -> Dataset:
    """List the images below ``data.root``; none is decoded.

    Class names are folder names with ``_`` for a space, or what ``data.class_names`` gives for them, in the natural
    order of the folders. Hidden files and folders are ignored; other files that are not images by their ending are
    left out and counted. Without folders of splits each class is split 50/20/30. A set with train/ and val/ alone is
    tested on val/.

    Raises:
        UserError: no such directory, no classes, one class only, a class without images, two folders of one
            name, a test class that is not in train/, folders called like splits that are none, an image in two classes.
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
    listing = _Listing(root)
    splits = _split_folders(root, listing)
    classnames = _classes(splits.get("train", root), config.class_names)
    if "train" in splits:
        train = listing.samples(splits["train"], classnames)
        val = listing.samples(splits["val"], classnames) if "val" in splits else ()
        test = listing.samples(splits["test"], classnames) if "test" in splits else val
    else:
        train, val, test = split_by_class(listing.samples(root, classnames))
    twice = look_for_duplicates(Splits(train, () if test is val else val, test), root, str(root))
    return Dataset(
        name="folder",
        classnames=tuple(classnames.values()),
        train=train,
        val=val,
        test=test,
        subset="all",
        read=FileReader(root),
        where=str(root),
        notes=(
            *listing.notes(),
            *twice,
            *note_on_gaps(tuple(classnames.values()), train, test),
            *note_on_names(tuple(classnames.values()), Dataset.template, _REMEDY),
        ),
    )


def _split_folders(root: Path, listing: _Listing) -> dict[str, Path]:
    """The folders of train, val and test, or nothing if ``root`` holds the classes themselves.

    A folder called "train" may be a class of vehicles: it is a split only if it holds folders itself.
    """
    folders = _class_folders(root)
    for folder in visible_folders(root):
        if folder not in folders:
            listing.runs.append(f"{folder.name}/")
    found = [folder for folder in folders if split_of(folder.name)]
    splits: dict[str, Path] = {}
    for folder in found:
        split = split_of(folder.name)
        if split is not None and visible_folders(folder):
            if split in splits:
                raise UserError(
                    f"{root} has both {splits[split].name}/ and {folder.name}/, which mean {split}."
                )
            splits[split] = folder
    if not splits:
        _refuse_splits_as_classes(root, folders)
        _refuse_same_folders_within(root, folders)
        return {}
    names = "/ and ".join(folder.name for folder in found)
    if "train" not in splits:
        raise UserError(f"{root} has {names}/ but no train/ with class folders; {_ADVICE}.")
    beside = [folder for folder in folders if folder not in splits.values()]
    if len(splits) == 1:
        others = f" (beside it: {', '.join(folder.name + '/' for folder in beside)})" if beside else ""
        raise UserError(
            f"{root} has {splits['train'].name}/ but no test/ (or val/) with class folders{others}, so there is nothing "
            "to test on."
        )
    for folder in beside:
        listing.leave_out(folder)
    for split, folder in splits.items():
        listing.leave_out_files(folder)
        if folder.name != split:
            listing.renamed.append(f"{folder.name}/ is read as {split}/")
    return splits


def _refuse_splits_as_classes(root: Path, folders: list[Path]) -> None:
    called = [folder for folder in folders if looks_like_split(folder.name)]
    deep = [folder for folder in called if visible_folders(folder)]
    if len(deep) > 1 or (len(called) > 1 and called == folders):
        raise UserError(
            f"The folders {', '.join(f'{folder.name}/' for folder in called)} in {root} are called like splits, and are "
            "not read as classes; call them train/, val/ and test/, with class folders in each."
        )


def _refuse_same_folders_within(root: Path, folders: list[Path]) -> None:
    """Whatever they are called, folders that hold nothing but the same folders may be splits, or the classes within."""
    within = [{one.name for one in visible_folders(folder)} for folder in folders]
    same = sorted(set.intersection(*within)) if len(within) > 1 else []
    if len(same) < 2 or not (len(same) >= len(folders) or any(map(looks_like_split, same))):
        return
    if not any(_is_image(path) for folder in folders for path in visible_files(folder)):
        some = [
            ", ".join(f"{name}/" for name in names[:_SHOWN])
            for names in ([one.name for one in folders], same)
        ]
        raise UserError(
            f"The folders {some[0]} in {root} hold no images but the same folders, {some[1]}: which of them are the classes? "
            "Call splits train/, val/ and test/, with class folders in each, put each class's images into its own folder, or "
            "list them in a table."
        )


def _classes(folder: Path, names_file: Path | None) -> dict[str, str]:
    """Folder name -> class name, in the natural order of folder names."""
    folders = sorted(_class_folders(folder), key=lambda path: natural_order(path.name))
    if not folders:
        raise UserError(f"{folder} has no class folders; {_ADVICE}.")
    if len(folders) == 1:
        raise UserError(
            f"{folder} has one class folder ({folders[0].name}); a classifier needs two or more{_deeper(folders[0])}."
        )
    given = {} if names_file is None else read_class_names(names_file, [path.name for path in folders])
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path in folders:
        refuse_undecodable(path, folder)
        name = prompt_name(given.get(path.name, path.name))
        if not name:
            raise UserError(
                f"The class folder {path} has no name left once `_` is read as a space; rename it."
            )
        if name in taken:
            raise UserError(
                f"The class folders {taken[name]!r} and {path.name!r} in {folder} both mean {name!r}."
            )
        taken[name] = path.name
        names[_same_form(path.name)] = name
    return names


def _class_folders(folder: Path) -> list[Path]:
    """Without those that hold runs."""
    return [one for one in visible_folders(folder) if not holds_runs(one)]


def _deeper(folder: Path) -> str:
    """What to do if the classes lie in the only folder that was taken for a class."""
    within = visible_folders(folder)
    if len(within) < 2:
        return ""
    return (
        f"; {folder} holds {len(within)} folders, {within[0].name}/ and so on: if these are meant, they lie one level "
        f"too deep (move them to {folder.parent}, or name {folder} where that is what --root names)"
    )


def _same_form(name: str) -> str:
    """A folder's name in one Unicode form: disks differ in how they write an accent."""
    return unicodedata.normalize("NFC", name)


@dataclass
class _Listing:
    """Lists class folders, and counts what it leaves out below ``root``."""

    root: Path
    left_out: Counter[str] = field(default_factory=Counter)
    nested: dict[str, int] = field(default_factory=dict)  # images in folders within a class's, by folder
    renamed: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leave_out_files(self.root)

    def samples(self, folder: Path, classnames: dict[str, str]) -> tuple[Sample, ...]:
        """The images of the class folders in ``folder``, class by class."""
        labels = {name: label for label, name in enumerate(classnames)}
        found: dict[int, list[Sample]] = {}
        for path in _class_folders(folder):
            name = _same_form(path.name)
            if name not in labels:
                raise UserError(f"Class {path.name!r} is in {folder} but not among the classes to train on.")
            images = self._images(path)
            found[labels[name]] = [
                Sample(image.relative_to(self.root).as_posix(), labels[name], classnames[name])
                for image in images
            ]
        return tuple(sample for label in sorted(found) for sample in found[label])

    def leave_out(self, folder: Path) -> None:
        """Count the images of a folder that is no class and no split."""
        images, _ = _scan(folder)
        self.left_out[f"images in {folder.name}/"] += len(images)

    def leave_out_files(self, folder: Path) -> None:
        """Count the files that lie beside class folders."""
        for path in visible_files(folder):
            self.left_out["images outside of class folders" if _is_image(path) else _kind(path)] += 1

    def notes(self) -> tuple[str, ...]:
        notes = [f"In {self.root} {', '.join(self.renamed)}."] if self.renamed else []
        if self.runs:
            notes.append(f"In {self.root} {', '.join(self.runs)} holds runs, and is not read as a class.")
        counts = [_counted(what, count) for what, count in sorted(self.left_out.items()) if count]
        if counts:
            notes.append(f"Left out below {self.root}: {', '.join(counts)}.")
        if self.nested:
            shown = ", ".join(f"{name}/" for name in list(self.nested)[:_SHOWN])
            more = ", ..." if len(self.nested) > _SHOWN else ""
            notes.append(
                f"{sum(self.nested.values())} images lie in folders within a class's folder, {shown}{more}, and are "
                "taken for images of that class."
            )
        return tuple(notes)

    def _images(self, folder: Path) -> list[Path]:
        images, others = _scan(folder)
        if not images:
            known = ", ".join(sorted(endings()))
            holds = f"; it holds {', '.join(map(_counted, others, others.values()))}" if others else ""
            raise UserError(
                f"The class folder {folder} has no images (files ending in {known}){holds}.", exit_status=1
            )
        self.left_out.update(others)
        for image in images:
            refuse_undecodable(image, self.root)
            if image.parent != folder:
                within = image.relative_to(self.root).parts[: len(folder.relative_to(self.root).parts) + 1]
                name = "/".join(within)
                self.nested[name] = self.nested.get(name, 0) + 1
        return images


def images_below(folder: Path) -> list[Path]:
    """Images at any depth, in the same order on every machine; hidden ones apart."""
    return _scan(folder)[0]


def _scan(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Images at any depth, sorted by their parts (the same order on every machine), and how many other files of each
    kind; hidden ones apart."""
    images: list[Path] = []
    others: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if any(map(is_hidden, path.relative_to(folder).parts)):
            continue
        if path.is_dir():
            others["links to folders"] += path.is_symlink()
        elif _is_image(path):
            images.append(path)
        else:
            others[_kind(path)] += 1
    return sorted(images, key=lambda path: path.parts), +others


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in endings() and path.is_file()


def _kind(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return "broken links"
    return path.suffix.lower() or "files without an ending"


def _counted(what: str, count: int) -> str:
    """A number and what it counts: 2 broken links, 1 broken link, 1 .csv."""
    return f"{count} {what}" if count > 1 else "1 " + re.sub("^(image|link|file|broken link)s", r"\1", what)
