"""The data sets that can be named in a configuration. The registry is data; adding a set is adding a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cocoop_fast.config import DataConfig
from cocoop_fast.data import digits, icons, image_folder, image_list
from cocoop_fast.data.dataset import Dataset
from cocoop_fast.data.sets import SETS, record
from cocoop_fast.errors import UserError
from cocoop_fast.spelling import meant, near


@dataclass(frozen=True)
class DatasetEntry:
    """One row of the registry.

    Args:
        name: what ``data.name`` says.
        title: a line for a listing.
        layout: where the images are looked for, relative to ``data.root`` ("" if they ship with a package).
        load: reads the lists of samples (no image is decoded); raises ``UserError``.
        missing: the paths below ``data.root`` that are needed and not there (empty: ready).
    """

    name: str
    title: str
    layout: str
    load: Callable[[DataConfig], Dataset]
    missing: Callable[[DataConfig], tuple[str, ...]]


REGISTRY: dict[str, DatasetEntry] = {
    entry.name: entry
    for entry in (
        DatasetEntry(
            name="digits",
            title="handwritten digits, 1,797 scans of 8x8 pixels, 10 classes (ships with scikit-learn)",
            layout="",
            load=digits.load,
            missing=lambda config: (),
        ),
        *(
            DatasetEntry(
                name=name,
                title=f"{icon_set.title} (fonts of qtawesome)",
                layout="",
                load=partial(icons.load, name),
                missing=icons.missing,
            )
            for name, icon_set in icons.ICON_SETS.items()
        ),
        DatasetEntry(
            name="folder",
            title="your own images: a folder a class, with or without train/val/test above them",
            layout="<root>/[train|val|test/]<class>/<image>",
            load=image_folder.load,
            missing=image_folder.missing,
        ),
        DatasetEntry(
            name="list",
            title="your own images: a CSV, text or JSON file that lists them",
            layout="<root>, a file beside the images",
            load=image_list.load,
            missing=image_list.missing,
        ),
        *(
            DatasetEntry(
                name=published.name,
                title=published.title,
                layout=published.layout,
                load=partial(record.load, published),
                missing=partial(record.missing, published),
            )
            for published in SETS.values()
        ),
    )
}

# The reference's class names, such as OxfordPets, mean the same sets.
_NAMES = {name: name for name in REGISTRY} | {
    published.reference_name: published.name for published in SETS.values()
}


def canonical_name(name: str) -> str:
    """The registry's own name for a data set, from that or from the reference's ``DATASET.NAME``, in any spelling.

    Raises:
        UserError: there is no such data set.
    """
    found = meant(name, _NAMES)
    if found is None:
        alike = near(name, _NAMES, cutoff=0.75)
        hint = f"did you mean {_NAMES[alike[0]]}? The sets are" if alike else "choose one of"
        raise UserError(f"There is no data set called {name!r}; {hint} {', '.join(REGISTRY)}.")
    return _NAMES[found]


def name_for(root: Path) -> str:
    """Which of a user's own data sets lies at ``root``: a list if it ends like a file's name, else a folder."""
    listed = root.suffix.lower() in image_list.ENDINGS or (root.suffix and root.is_file())
    return "list" if listed else "folder"


def load_dataset(config: DataConfig) -> Dataset:
    """All samples of the data set that ``config`` names: every class, no few-shot sampling.

    Raises:
        UserError: the name is unknown, or the files are not as the data set needs them; names for folders of a data
            set that has none.
    """
    name = canonical_name(config.name)
    if config.class_names is not None and name != "folder":
        raise UserError(f"data.class_names names the classes of folders; data set {name!r} names its own.")
    return REGISTRY[name].load(config)
