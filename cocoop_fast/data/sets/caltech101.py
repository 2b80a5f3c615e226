"""Caltech-101 (Fei-Fei et al., 2004)."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Splits
from cocoop_fast.data.sets.class_folders import split_class_folders
from cocoop_fast.data.sets.record import Part, PublishedSet, TorchvisionDownload

IGNORED = ("BACKGROUND_Google", "Faces_easy")
RENAMED = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}


def read(folder: Path) -> Splits:
    """Folders are classes, except those that are :data:`IGNORED`."""
    return split_class_folders(folder / "101_ObjectCategories", ignored=IGNORED, renamed=RENAMED)


SET = PublishedSet(
    name="caltech101",
    reference_name="Caltech101",
    title="objects, 100 classes",
    folder="caltech-101",
    images="101_ObjectCategories",
    classes=100,
    counts=(4_128, 1_649, 2_465),
    parts=(
        Part(
            "101_ObjectCategories",
            "https://data.caltech.edu/records/mzrjq-6wc02 (caltech-101.zip, in it 101_ObjectCategories.tar.gz)",
        ),
    ),
    split=Part(
        "split_zhou_Caltech101.json",
        "https://drive.google.com/file/d/1hyarUivQE36mY6jSomru6Fjd-JzwcCzN/view",
    ),
    read=read,
    download=TorchvisionDownload(
        "Caltech101", moves=(("caltech101/101_ObjectCategories", "101_ObjectCategories"),)
    ),
)
