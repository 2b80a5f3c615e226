"""Split files ``split_zhou_*.json``: ``{"train" | "val" | "test": [[path, label, class name], ...]}``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.listing import read_json
from cocoop_fast.data.paths import relative_path
from cocoop_fast.data.split_names import SPLITS
from cocoop_fast.errors import UserError
from cocoop_fast.files.atomic import write_json


def read_split(path: Path) -> Splits:
    """Read a split file. Paths are relative to the images' directory; class names are as written.

    Raises:
        UserError: not such a file, or a path that leaves the images' directory; the row is named.
    """
    return parse_split(read_json(path), path)


def parse_split(values: Any, path: Path) -> Splits:
    """As :func:`read_split`, from the JSON value of ``path``."""
    if not isinstance(values, dict) or not all(isinstance(values.get(name), list) for name in SPLITS):
        raise UserError(f"{path} is not a split file: it must hold train, val and test lists.", exit_status=1)
    return Splits(
        *(
            tuple(_sample(row, f"{path}: row {i} of {name}") for i, row in enumerate(values[name]))
            for name in SPLITS
        )
    )


def write_split(path: Path, splits: Splits) -> None:
    """Write a split file beside the images, whole or not at all."""
    rows = {name: _rows(samples) for name, samples in zip(SPLITS, splits, strict=True)}
    write_json(path, rows, many_writers=True)


def _rows(samples: Iterable[Sample]) -> list[list[str | int]]:
    return [[sample.source, sample.label, sample.classname] for sample in samples]


def _sample(row: Any, where: str) -> Sample:
    if not isinstance(row, list) or len(row) != 3:
        raise UserError(f"{where} is not [path, label, class name].", exit_status=1)
    path, label, classname = row
    if isinstance(label, bool) or not (
        isinstance(label, int) or (isinstance(label, str) and label.isdecimal())
    ):
        raise UserError(f"{where}: the label {label!r} is not a number.", exit_status=1)
    if not isinstance(classname, str) or not classname.strip():
        raise UserError(f"{where}: the class name {classname!r} is not a text.", exit_status=1)
    return Sample(relative_path(path, where), int(label), classname)
