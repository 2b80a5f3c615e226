"""Oxford-IIIT Pet (Parkhi et al., 2012)."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.listing import text_lines
from cocoop_fast.data.paths import relative_path
from cocoop_fast.data.sets.record import SPLIT_SEED, Part, PublishedSet, TorchvisionDownload
from cocoop_fast.data.split import split_trainval
from cocoop_fast.errors import UserError


def read(folder: Path) -> Splits:
    """``annotations/{trainval,test}.txt``, a fifth of trainval for validation.

    The breed is the file's name before the last ``_``, in small letters.
    """
    train, val = split_trainval(_listed(folder / "annotations" / "trainval.txt"), SPLIT_SEED)
    return Splits(train, val, _listed(folder / "annotations" / "test.txt"))


def _listed(path: Path) -> tuple[Sample, ...]:
    """Lines "Abyssinian_100 1 1 1": file without ending, class from 1, species, number of the breed."""
    samples = []
    for number, line in enumerate(text_lines(path), start=1):
        fields = line.split(" ")
        if len(fields) != 4 or not fields[1].isdecimal() or "_" not in fields[0]:
            raise UserError(
                f"{path}: line {number} is {line!r}, not a file, class, species and breed.", exit_status=1
            )
        breed = fields[0].rsplit("_", 1)[0].lower()
        source = relative_path(f"{fields[0]}.jpg", f"{path}: line {number}")
        samples.append(Sample(source, int(fields[1]) - 1, breed))
    return tuple(samples)


_ANNOTATIONS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz"

SET = PublishedSet(
    name="oxford_pets",
    reference_name="OxfordPets",
    title="breeds of cats and dogs, 37 classes",
    folder="oxford_pets",
    images="images",
    classes=37,
    counts=(2_944, 736, 3_669),
    parts=(Part("images", "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz"),),
    split=Part(
        "split_zhou_OxfordPets.json",
        "https://drive.google.com/file/d/1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs/view",
    ),
    raw=(Part("annotations/trainval.txt", _ANNOTATIONS), Part("annotations/test.txt", _ANNOTATIONS)),
    read=read,
    template="a photo of a {}, a type of pet.",
    download=TorchvisionDownload(
        "OxfordIIITPet",
        moves=(("oxford-iiit-pet/images", "images"), ("oxford-iiit-pet/annotations", "annotations")),
    ),
)
