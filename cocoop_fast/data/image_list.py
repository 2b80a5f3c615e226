"""Your own images, listed in a table or a JSON file that lies beside them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cocoop_fast.config import DataConfig
from cocoop_fast.data.class_names import note_on_gaps, note_on_names
from cocoop_fast.data.dataset import Dataset, Sample, Splits, named_classes, plain, prompt_name
from cocoop_fast.data.duplicates import look_for_duplicates
from cocoop_fast.data.images import FileReader
from cocoop_fast.data.listing import natural_order, read_json, read_text, text_lines
from cocoop_fast.data.paths import as_on_disk, relative_path
from cocoop_fast.data.split import split_by_class
from cocoop_fast.data.split_file import parse_split
from cocoop_fast.data.split_names import SPLITS, split_of
from cocoop_fast.errors import UserError
from cocoop_fast.files.parsing import ParseError, json_value

ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl")
_DELIMITERS = ",;\t|"
_FIELDS = ("path", "classname", "label", "split")
_SHAPE = "a header `path,classname` (and label and split, if you like)"


def missing(config: DataConfig) -> tuple[str, ...]:
    """What keeps this data set from being loaded, in a user's words."""
    if config.root is None:
        return ("data.root: a CSV, text or JSON file beside the images",)
    return () if config.root.is_file() else (str(config.root),)


def load(config: DataConfig) -> Dataset:
    """Read the list at ``data.root``; no image is decoded. Paths in it are relative to its own directory.

    Either rows with the fields ``path`` and ``classname``, and optionally ``label`` (an integer from 0; without
    it classes are numbered by name) and ``split`` (train, val or test; without it each class is split 50/20/30):
    a table with a header, between commas, semicolons, tabs or bars; a JSON list of objects; or a JSON object a line
    (.jsonl). Capitals and spaces in the header do not matter, and other fields are ignored. Or a JSON split file,
    ``{"train" | "val" | "test": [[path, label, class name], ...]}``. A list with train and val alone is tested
    on val.

    Raises:
        UserError: no such file, not one of these forms, a path that leaves the directory, one class only, nothing to
            train or to test on, or an image under two classes.
    """
    path = config.root
    if path is None:
        raise UserError(
            "Data set 'list' needs data.root (--root FILE): a CSV, text or JSON file beside the images."
        )
    if path.suffix.lower() not in ENDINGS:
        raise UserError(
            f"Data set 'list' reads {', '.join(ENDINGS)} files, and data.root is {path}; of a spreadsheet, save the "
            "table as CSV."
        )
    if not path.exists():
        raise UserError(f"The list of images {path} does not exist.")
    values = _values(path)
    notes: tuple[str, ...] = ()
    if isinstance(values, dict):
        splits = parse_split(values, path)
    else:
        rows, notes = _rows(values, path)
        splits = _split(rows)
    classnames, splits = named_classes(splits, str(path))
    if len(classnames) < 2:
        raise UserError(f"{path} has one class; a classifier needs two or more.", exit_status=1)
    if not splits.train or not (splits.test or splits.val):
        raise UserError(f"{path} needs images to train on and to test on.", exit_status=1)
    tested = splits if splits.test else Splits(splits.train, (), splits.val)
    notes += look_for_duplicates(tested, path.parent, str(path))
    notes += note_on_gaps(classnames, splits.train, splits.test or splits.val)
    return Dataset(
        name="list",
        classnames=classnames,
        train=splits.train,
        val=splits.val,
        test=splits.test or splits.val,
        subset="all",
        read=FileReader(path.parent, confined=True),
        where=str(path),
        notes=(*notes, *note_on_names(classnames, Dataset.template, "write names in `classname`")),
    )


def _values(path: Path) -> Any:
    """The rows of a table or of JSON, or the value of a split file."""
    ending = path.suffix.lower()
    if ending == ".json":
        return read_json(path)
    return _json_lines(path) if ending == ".jsonl" else _table(path)


def _json_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text_lines(path), start=1):
        try:
            rows.append(json_value(line))
        except ParseError as error:
            raise UserError(f"{path}: row {number} cannot be used: {error}.", exit_status=1) from error
    return rows


def _table(path: Path) -> list[Any]:
    """The rows by the names of their columns. Rows and columns without a word, as spreadsheets leave them, are none."""
    text = read_text(path).lstrip("\ufeff")
    if not text.strip():
        raise UserError(f"{path} is empty.", exit_status=1)
    said = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel's own way to say it
    if said is not None:
        text = text[said.end() :]
    try:
        header, lines = _header_and_rows(text.lstrip(), said.group(1) if said else _DELIMITERS, path)
    except csv.Error as error:
        raise UserError(f"{path} is not a table: {error}.", exit_status=1) from error
    rows = [[value.strip() for value in line] for line in lines]
    return [
        {name: value for name, value in zip(header, row, strict=False) if name}
        | ({"": row[len(header) :]} if any(row[len(header) :]) else {})
        for row in rows
        if any(row)
    ]


def _header_and_rows(text: str, delimiters: str, path: Path) -> tuple[list[str], list[list[str]]]:
    """Between the first of the delimiters that gives the columns that a list has."""
    first = text.splitlines()[0] if text else ""
    for delimiter in delimiters:
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        fields = [_field(name) for name in header]
        if fields.count("path") == fields.count("classname") == 1:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
            return header, list(rows)[1:]
    raise UserError(f"{path} begins with {first[:200]!r}, but needs {_SHAPE}.", exit_status=1)


def _field(name: str) -> str:
    """A field's name as it is known here: small letters without spaces."""
    return re.sub(r"[\s_-]", "", name).lower()


def _rows(values: Any, path: Path) -> tuple[list[tuple[Sample, str | None]], tuple[str, ...]]:
    """Samples with their split, each once, and what to tell of them. Labels are checked by ``named_classes``."""
    if not isinstance(values, list):
        raise UserError(f"{path} holds neither a list of images nor a split.", exit_status=1)
    if not values:
        raise UserError(f"{path} lists no images.", exit_status=1)
    read = [_fields(row, f"{path}: image {number}") for number, row in enumerate(values, start=1)]
    if len({label is None for _, _, label, _ in read}) > 1:
        raise UserError(f"{path} gives some images a label and others none.", exit_status=1)
    if len({split is None for *_, split in read}) > 1:
        raise UserError(f"{path} gives some images a split and others none.", exit_status=1)
    notes = []
    ignored = dict.fromkeys(name for row in values for name in row if _field(name) not in _FIELDS)
    if ignored:
        notes.append(f"Not used of {path}: {', '.join(ignored)}.")
    once = list(dict.fromkeys(read))
    if len(once) < len(read):
        notes.append(
            f"{len(read) - len(once)} of the {len(read)} rows of {path} repeat others and are left out."
        )
    read = [(as_on_disk(path.parent, source), name, label, split) for source, name, label, split in once]
    _refuse_same_prompts({name for _, name, *_ in read}, path)
    by_name = {
        name: label for label, name in enumerate(sorted({name for _, name, *_ in read}, key=natural_order))
    }
    samples = [
        (Sample(source, by_name[name] if label is None else label, name), split)
        for source, name, label, split in read
    ]
    return samples, tuple(notes)


def _refuse_same_prompts(names: Iterable[str], path: Path) -> None:
    by_prompt: dict[str, str] = {}
    for name in sorted(names):
        other = by_prompt.setdefault(prompt_name(name), name)
        if other != name:
            raise UserError(
                f"{path}: the class names {other!r} and {name!r} both mean {prompt_name(name)!r}; write one of them "
                "throughout.",
                exit_status=1,
            )


def _fields(row: Any, where: str) -> tuple[str, str, int | None, str | None]:
    """(path, class name, label, split) of one row."""
    if not isinstance(row, Mapping) or "" in row:  # which holds what goes beyond the header
        raise UserError(f"{where} is {row!r}, not one with the fields {', '.join(_FIELDS)}.", exit_status=1)
    row = {_field(name): value for name, value in row.items()}
    source = relative_path(row.get("path"), where)
    name, label, split = row.get("classname"), row.get("label"), row.get("split")
    if not isinstance(name, str) or not plain(name):
        raise UserError(f"{where} ({source}) has no classname.", exit_status=1)
    if isinstance(label, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", label):
        label = int(label)
    if label == "":
        label = None
    if label is not None and (not isinstance(label, int) or isinstance(label, bool)):
        raise UserError(f"{where} ({source}) has the label {label!r}, not an integer from 0.", exit_status=1)
    if split == "":
        split = None
    meant = split_of(split) if isinstance(split, str) else None
    if split is not None and meant is None:
        raise UserError(
            f"{where} ({source}) has the split {split!r}, not one of {', '.join(SPLITS)}.", exit_status=1
        )
    return source, plain(name), label, meant


def _split(rows: list[tuple[Sample, str | None]]) -> Splits:
    if rows[0][1] is None:
        return split_by_class([sample for sample, _ in rows])
    return Splits(*(tuple(sample for sample, split in rows if split == name) for name in SPLITS))
