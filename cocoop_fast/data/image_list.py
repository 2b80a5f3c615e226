"""Your own images, listed in a CSV or JSON file that lies beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoop_fast.config import DataConfig
from cocoop_fast.data.dataset import Dataset, Sample, Splits, named_classes
from cocoop_fast.data.images import FileReader
from cocoop_fast.data.listing import read_json, text_lines
from cocoop_fast.data.paths import relative_path
from cocoop_fast.data.split import split_by_class
from cocoop_fast.data.split_file import parse_split
from cocoop_fast.data.split_names import SPLITS
from cocoop_fast.errors import UserError

ENDINGS = (".csv", ".json")
_FIELDS = ("path", "classname", "label", "split")
_SHAPE = "a header `path,classname` (and label and split, if you like)"


def missing(config: DataConfig) -> tuple[str, ...]:
    """What keeps this data set from being loaded, in a user's words."""
    if config.root is None:
        return ("data.root: a CSV or JSON file beside the images",)
    return () if config.root.is_file() else (str(config.root),)


def load(config: DataConfig) -> Dataset:
    """Read the list at ``data.root``; no image is opened. Paths in it are relative to its own directory.

    Either rows with the fields ``path`` and ``classname``, and optionally ``label`` (an integer from 0; without
    it classes are numbered by name) and ``split`` (train, val or test; without it each class is split 50/20/30):
    a CSV file with a header, or a JSON list of objects. Or a JSON split file,
    ``{"train" | "val" | "test": [[path, label, class name], ...]}``. A list with train and val alone is tested
    on val.

    Raises:
        UserError: no such file, not one of these forms, a path that leaves the directory, one class only, or
            nothing to train or to test on.
    """
    path = config.root
    if path is None:
        raise UserError(
            "Data set 'list' needs data.root (--root FILE): a CSV or JSON file beside the images."
        )
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"Data set 'list' reads {' and '.join(ENDINGS)} files, and data.root is {path}.")
    if not path.exists():
        raise UserError(f"The list of images {path} does not exist.")
    values = read_json(path) if path.suffix.lower() == ".json" else _csv_rows(path)
    splits = parse_split(values, path) if isinstance(values, dict) else _split(_rows(values, path))
    classnames, splits = named_classes(splits, str(path))
    if len(classnames) < 2:
        raise UserError(f"{path} has one class; a classifier needs two or more.", exit_status=1)
    if not splits.train or not (splits.test or splits.val):
        raise UserError(f"{path} needs images to train on and to test on.", exit_status=1)
    return Dataset(
        name="list",
        classnames=classnames,
        train=splits.train,
        val=splits.val,
        test=splits.test or splits.val,
        read=FileReader(path.parent, confined=True),
        where=str(path),
    )


def _csv_rows(path: Path) -> list[Any]:
    reader = csv.DictReader(io.StringIO("\n".join(text_lines(path))), restkey="")
    if not {"path", "classname"} <= set(reader.fieldnames or ()) <= set(_FIELDS):
        raise UserError(f"{path} begins with {reader.fieldnames}, but needs {_SHAPE}.", exit_status=1)
    return list(reader)


def _rows(values: Any, path: Path) -> list[tuple[Sample, str | None]]:
    """Samples with their split. Labels are checked by ``named_classes``."""
    if not isinstance(values, list):
        raise UserError(f"{path} holds neither a list of images nor a split.", exit_status=1)
    if not values:
        raise UserError(f"{path} lists no images.", exit_status=1)
    read = [_fields(row, f"{path}: image {number}") for number, row in enumerate(values, start=1)]
    if len({label is None for _, _, label, _ in read}) > 1:
        raise UserError(f"{path} gives some images a label and others none.", exit_status=1)
    if len({split is None for *_, split in read}) > 1:
        raise UserError(f"{path} gives some images a split and others none.", exit_status=1)
    by_name = {name: label for label, name in enumerate(sorted({name for _, name, *_ in read}))}
    return [
        (Sample(source, by_name[name] if label is None else label, name), split)
        for source, name, label, split in read
    ]


def _fields(row: Any, where: str) -> tuple[str, str, int | None, str | None]:
    """(path, class name, label, split) of one row."""
    if not isinstance(row, Mapping) or not set(row) <= set(_FIELDS):
        raise UserError(f"{where} is {row!r}, not one with the fields {', '.join(_FIELDS)}.", exit_status=1)
    source = relative_path(row.get("path"), where)
    name, label, split = row.get("classname"), row.get("label"), row.get("split")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where} ({source}) has no classname.", exit_status=1)
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    if label == "":
        label = None
    if label is not None and (not isinstance(label, int) or isinstance(label, bool)):
        raise UserError(f"{where} ({source}) has the label {label!r}, not an integer from 0.", exit_status=1)
    if split == "":
        split = None
    if split is not None and split not in SPLITS:
        raise UserError(
            f"{where} ({source}) has the split {split!r}, not one of {', '.join(SPLITS)}.", exit_status=1
        )
    return source, name.strip(), label, split


def _split(rows: list[tuple[Sample, str | None]]) -> Splits:
    if rows[0][1] is None:
        return split_by_class([sample for sample, _ in rows])
    return Splits(*(tuple(sample for sample, split in rows if split == name) for name in SPLITS))
