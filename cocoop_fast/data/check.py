"""Open every image before a run starts, so that a bad file costs a second and not a night."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.data.images import CORRECTIONS, FileReader, ImageError
from cocoop_fast.errors import UserError

_SHOWN = 20


@dataclass(frozen=True)
class Seen:
    """What opening images has shown.

    Args:
        count: how many there are, each once.
        bad: why an image cannot be read.
        notes: how many were read otherwise than they are stored, a sentence for each way.
    """

    count: int
    bad: dict[Sample, str]
    notes: tuple[str, ...]


def look_at_images(dataset: Dataset, threads: int = 4) -> Seen:
    """Decode every image of the three splits in full, by so many threads (Pillow releases the interpreter lock)."""
    samples = list(dict.fromkeys((*dataset.train, *dataset.val, *dataset.test)))
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda sample: _look_at(dataset, sample), samples))
    corrected = Counter(kind for _, kinds in found for kind in kinds)
    return Seen(
        count=len(samples),
        bad={sample: fault for sample, (fault, _) in zip(samples, found, strict=True) if fault},
        notes=tuple(
            f"{corrected[kind]} of {len(samples)} images {text}."
            for kind, text in CORRECTIONS.items()
            if corrected[kind]
        ),
    )


def check_images(
    dataset: Dataset,
    *,
    skip_bad: bool = False,
    threads: int = 4,
    on_message: Callable[[str], None] | None = None,
) -> Dataset:
    """Decode every image of the three splits in full.

    Args:
        dataset: few-shot sampling and class selection already done, so that only what is used is read.
        skip_bad: leave bad images out instead of failing.
        threads: decoders at once.
        on_message: told how many were left out, and how many were read otherwise than they are stored.

    Returns:
        The data set, without bad images if they are skipped.

    Raises:
        UserError: bad images (the first twenty are named), or a class left without images.
    """
    seen = look_at_images(dataset, threads)
    bad, told = seen.bad, list(seen.notes)
    if bad and not skip_bad:
        noun = "image" if len(bad) == 1 else "images"
        raise UserError(
            f"{len(bad)} {noun} in {dataset.where} cannot be read: {_names(bad)}. Replace or delete them, or "
            "leave them out with --skip-bad-images.",
            exit_status=1,
        )
    kept = dataset
    if bad:
        kept = dataset.with_splits(
            train=tuple(sample for sample in dataset.train if sample not in bad),
            val=tuple(sample for sample in dataset.val if sample not in bad),
            test=tuple(sample for sample in dataset.test if sample not in bad),
        )
        _refuse_emptied_classes(dataset, kept)
        told.append(f"Left out {len(bad)} of {seen.count} images that cannot be read: {_names(bad)}.")
    if on_message is not None:
        for line in told:
            on_message(line)
    return kept


def _look_at(dataset: Dataset, sample: Sample) -> tuple[str, tuple[str, ...]]:
    """Why an image cannot be used, or "", and how it was corrected."""
    try:
        if isinstance(dataset.read, FileReader):
            return "", dataset.read.corrected(sample)[1]
        dataset.read(sample)
    except ImageError as error:
        return str(error), ()
    return "", ()


def _names(bad: dict[Sample, str]) -> str:
    shown = [f"{sample.source} ({fault})" for sample, fault in list(bad.items())[:_SHOWN]]
    more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    return ", ".join(shown + more)


def _refuse_emptied_classes(before: Dataset, after: Dataset) -> None:
    for split, was, now in (("training", before.train, after.train), ("test", before.test, after.test)):
        lost = {sample.classname for sample in was} - {sample.classname for sample in now}
        if lost:
            raise UserError(
                f"Class {min(lost)!r} in {before.where} has no readable {split} image left; add some.",
                exit_status=1,
            )
