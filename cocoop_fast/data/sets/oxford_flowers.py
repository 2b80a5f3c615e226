"""Oxford Flowers 102 (Nilsback and Zisserman, 2008), on the reference's own split."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.listing import read_json
from cocoop_fast.data.sets.mat_files import read_mat
from cocoop_fast.data.sets.record import SPLIT_SEED, Part, PublishedSet, TorchvisionDownload
from cocoop_fast.data.split import split_by_class
from cocoop_fast.errors import UserError

_LABELS, _NAMES = "imagelabels.mat", "cat_to_name.json"


def read(folder: Path) -> Splits:
    """``imagelabels.mat`` numbers the classes of ``image_00001.jpg``, ... from 1; split 50/20/30 a class."""
    labels = read_mat(folder / _LABELS, "labels", lambda value: [int(label) for label in value[0]])
    names = read_json(folder / _NAMES)
    if not isinstance(names, dict):
        raise UserError(f"{folder / _NAMES} must map class numbers to names.", exit_status=1)
    samples = []
    for number, label in enumerate(labels, start=1):
        name = names.get(str(label))
        if not isinstance(name, str):
            raise UserError(f"{folder / _NAMES} has no name for class {label}.", exit_status=1)
        samples.append(Sample(f"image_{number:05d}.jpg", label - 1, name))
    return split_by_class(samples, SPLIT_SEED)


_ADDRESS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"

SET = PublishedSet(
    name="oxford_flowers",
    reference_name="OxfordFlowers",
    title="flowers, 102 classes",
    folder="oxford_flowers",
    images="jpg",
    classes=102,
    counts=(4_093, 1_633, 2_463),
    parts=(Part("jpg", f"{_ADDRESS}/102flowers.tgz"),),
    split=Part(
        "split_zhou_OxfordFlowers.json",
        "https://drive.google.com/file/d/1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT/view",
    ),
    raw=(
        Part(_LABELS, f"{_ADDRESS}/imagelabels.mat"),
        Part(_NAMES, "https://drive.google.com/file/d/1AkcxCXeK_RCGCEC_GvmWxjcjaNhu-at0/view"),
    ),
    read=read,
    template="a photo of a {}, a type of flower.",
    download=TorchvisionDownload(
        "Flowers102", moves=(("flowers-102/jpg", "jpg"), ("flowers-102/imagelabels.mat", _LABELS))
    ),
)
