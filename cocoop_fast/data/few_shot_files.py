"""Few-shot samples on disk: portable manifests, and the caches of the reference.

A manifest is JSON, holds relative paths, all classes (before base and new ones are separated), and is named by
shots, seed and a digest of what it holds: ``shot_16-seed_1-0a1b2c3d4e5f.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cocoop_fast.config import DataConfig
from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.data.few_shot import sample_shots
from cocoop_fast.data.listing import read_json
from cocoop_fast.data.reference_cache import CachedImage, read_reference_cache
from cocoop_fast.errors import UserError
from cocoop_fast.files.atomic import write_json

_FORMAT = "cocoop_fast few-shot sample, version 1"
_DIGEST = re.compile(r"-([0-9a-f]{12})$")


def few_shot_sample(
    dataset: Dataset, config: DataConfig, seed: int, on_message: Callable[[str], None] | None = None
) -> Dataset:
    """The few-shot sample that a configuration asks for.

    It is read from ``data.few_shot``, a manifest, a cache of the reference, or a directory of such files; if
    that is not set, from the directory ``split_fewshot`` of a published data set, where the reference keeps its
    caches; and if there is none for these shots and this seed, it is drawn as the reference draws it.

    Args:
        dataset: all classes and images.
        seed: of the draw.
        on_message: told if a file is used.

    Raises:
        UserError: the file cannot be used, or does not fit the data set or ``data.shots``.
    """
    if config.shots == 0 or dataset.test_only:
        if config.few_shot is not None and config.shots == 0:
            raise UserError(
                "data.few_shot names a few-shot sample, but data.shots is 0, which is all images."
            )
        return dataset
    path = _file(dataset, config, seed)
    if path is None:
        return sample_shots(dataset, config.shots, seed)
    if on_message is not None:
        on_message(f"The few-shot sample is read from {path}.")
    return read_few_shot(path, dataset, config.shots)


def read_few_shot(path: Path, dataset: Dataset, shots: int) -> Dataset:
    """Keep the images that a file names.

    Args:
        path: a manifest, or a cache of the reference (``.pkl``).
        dataset: all of its images. Whatever is not one of them is refused, so a file cannot lead elsewhere.
        shots: what the sample must be of.

    Raises:
        UserError: as :func:`few_shot_sample`.
    """
    if path.suffix == ".pkl":
        images = read_reference_cache(path)
        train = _rerooted(images.train, dataset.train, path)
        val = dataset.val if dataset.val_is_test else _rerooted(images.val, dataset.val, path)
    else:
        values = _manifest(path, dataset, shots)
        train = _known(values.get("train"), dataset.train, path)
        val = dataset.val if dataset.val_is_test else _known(values.get("val"), dataset.val, path)
    _check_shots(train, dataset, shots, path)
    return dataset.with_splits(train=train, val=val)


def write_few_shot(folder: Path, sampled: Dataset, shots: int, seed: int) -> Path:
    """Write the manifest of a sample of all classes into ``folder``, which is made; returns its path."""
    values: dict[str, Any] = {
        "format": _FORMAT,
        "dataset": sampled.name,
        "shots": shots,
        "seed": seed,
        "train": _rows(sampled.train),
        "val": [] if sampled.val_is_test else _rows(sampled.val),
    }
    path = folder / f"shot_{shots}-seed_{seed}-{_digest(values)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, values, many_writers=True)
    return path


def _file(dataset: Dataset, config: DataConfig, seed: int) -> Path | None:
    given = config.few_shot
    if given is not None and not given.exists():
        raise UserError(f"The few-shot sample {given} does not exist.")
    if given is not None and given.is_file():
        return given
    folder = given or dataset.few_shot_dir
    if folder is None or not folder.is_dir():
        return None
    name = f"shot_{config.shots}-seed_{seed}"
    manifests = sorted(folder.glob(f"{name}-*.json"))
    if len(manifests) > 1:
        raise UserError(
            f"{folder} has {len(manifests)} few-shot samples for {config.shots} shots and seed {seed}; choose one with "
            "data.few_shot, or delete the others.",
            exit_status=1,
        )
    cache = folder / f"{name}.pkl"
    found = manifests[0] if manifests else cache if cache.is_file() else None
    if found is None and given is not None:
        raise UserError(f"{folder} has no few-shot sample for {config.shots} shots and seed {seed}.")
    return found


def _rows(samples: Iterable[Sample]) -> list[list[str | int]]:
    return [[sample.source, sample.label, sample.classname] for sample in samples]


def _digest(values: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that depend on all values, but not on how they are laid out in a file."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _manifest(path: Path, dataset: Dataset, shots: int) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise UserError(f"{path} is not a few-shot sample of this program.", exit_status=1)
    named = _DIGEST.search(path.stem)
    if named and named[1] != _digest(values):
        raise UserError(
            f"{path} was changed after it was written: its contents do not have the digest in its name.",
            exit_status=1,
        )
    for field, here in (("dataset", dataset.name), ("shots", shots)):
        if values.get(field) != here:
            raise UserError(
                f"{path} is a few-shot sample with {field} {values.get(field)!r}, but this run has {here!r}.",
                exit_status=1,
            )
    return values


def _known(rows: Any, samples: Iterable[Sample], path: Path) -> tuple[Sample, ...]:
    by_row = {(sample.source, sample.label, sample.classname): sample for sample in samples}
    found = []
    for row in rows if isinstance(rows, list) else [rows]:
        plain = isinstance(row, list) and all(isinstance(value, (str, int)) for value in row)
        sample = by_row.get(tuple(row)) if plain else None
        if sample is None:
            raise UserError(
                f"{path} names {row!r}, which is not among the images here; is it of another copy of the data?",
                exit_status=1,
            )
        found.append(sample)
    return tuple(found)


def _rerooted(images: list[CachedImage], samples: Iterable[Sample], path: Path) -> tuple[Sample, ...]:
    """Absolute paths of another machine, recognised by the longest end that is a path of this data set."""
    by_source = {sample.source: sample for sample in samples}
    found = []
    for image in images:
        parts = image.path.replace("\\", "/").split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        sample = next((by_source[end] for end in ends if end in by_source), None)
        if sample is None or sample.label != image.label:
            raise UserError(
                f"{path} names {image.path!r} as label {image.label}, which is not among the images here; it is "
                "of another split: delete it, and the images are drawn again.",
                exit_status=1,
            )
        found.append(sample)
    return tuple(found)


def _check_shots(train: tuple[Sample, ...], dataset: Dataset, shots: int, path: Path) -> None:
    images = Counter(sample.label for sample in train)
    for label, classname in enumerate(dataset.classnames):
        if not 1 <= images[label] <= shots:
            raise UserError(
                f"{path} has {images[label]} training images of class {classname!r}, but data.shots is {shots}.",
                exit_status=1,
            )
