"""FGVC-Aircraft (Maji et al., 2013): variants, on the official split."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.listing import text_lines
from cocoop_fast.data.paths import relative_path
from cocoop_fast.data.sets.record import Part, PublishedSet, TorchvisionDownload
from cocoop_fast.errors import UserError

_LISTS = ("images_variant_train.txt", "images_variant_val.txt", "images_variant_test.txt")


def read(folder: Path) -> Splits:
    """Labels in the order of ``variants.txt``."""
    labels = {name: label for label, name in enumerate(text_lines(folder / "variants.txt"))}
    return Splits(*(_listed(folder / name, labels) for name in _LISTS))


def _listed(path: Path, labels: dict[str, int]) -> tuple[Sample, ...]:
    """Lines "1025794 707-320": file without ending, variant (which may have spaces)."""
    samples = []
    for number, line in enumerate(text_lines(path), start=1):
        image, _, variant = line.partition(" ")
        if variant not in labels:
            raise UserError(f"{path}: line {number} has {variant!r}, not one of variants.txt.", exit_status=1)
        source = relative_path(f"{image}.jpg", f"{path}: line {number}")
        samples.append(Sample(source, labels[variant], variant))
    return tuple(samples)


_ARCHIVE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
_SOURCE = f"{_ARCHIVE} (fgvc-aircraft-2013b/data/)"

SET = PublishedSet(
    name="fgvc_aircraft",
    reference_name="FGVCAircraft",
    title="variants of aircraft, 100 classes",
    folder="fgvc_aircraft",
    images="images",
    classes=100,
    counts=(3_334, 3_333, 3_333),
    parts=tuple(Part(path, _SOURCE) for path in ("images", "variants.txt", *_LISTS)),
    read=read,
    template="a photo of a {}, a type of aircraft.",
    download=TorchvisionDownload(
        "FGVCAircraft",
        moves=tuple(
            (f"fgvc-aircraft-2013b/data/{path}", path) for path in ("images", "variants.txt", *_LISTS)
        ),
        archives=((_ARCHIVE, "d4acdd33327262359767eeaa97a4f732"),),
    ),
)
