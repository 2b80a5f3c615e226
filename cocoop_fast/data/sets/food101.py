"""Food-101 (Bossard et al., 2014), on the reference's own split rather than the official one."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Splits
from cocoop_fast.data.sets.class_folders import split_class_folders
from cocoop_fast.data.sets.record import Part, PublishedSet, TorchvisionDownload


def read(folder: Path) -> Splits:
    """Folders are classes."""
    return split_class_folders(folder / "images")


SET = PublishedSet(
    name="food101",
    reference_name="Food101",
    title="dishes, 101 classes",
    folder="food-101",
    images="images",
    classes=101,
    counts=(50_500, 20_200, 30_300),
    parts=(Part("images", "https://data.vision.ee.ethz.ch/cvl/food-101.tar.gz (images/)"),),
    split=Part(
        "split_zhou_Food101.json", "https://drive.google.com/file/d/1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl/view"
    ),
    read=read,
    template="a photo of {}, a type of food.",
    download=TorchvisionDownload("Food101", moves=(("food-101/images", "images"), ("food-101/meta", "meta"))),
)
