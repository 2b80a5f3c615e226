"""Describable Textures (Cimpoi et al., 2014), on the reference's own split."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Splits
from cocoop_fast.data.sets.class_folders import split_class_folders
from cocoop_fast.data.sets.record import Part, PublishedSet, TorchvisionDownload


def read(folder: Path) -> Splits:
    """Folders are classes."""
    return split_class_folders(folder / "images")


SET = PublishedSet(
    name="dtd",
    reference_name="DescribableTextures",
    title="textures, 47 classes",
    folder="dtd",
    images="images",
    classes=47,
    counts=(2_820, 1_128, 1_692),
    parts=(
        Part("images", "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz (dtd/images/)"),
    ),
    split=Part(
        "split_zhou_DescribableTextures.json",
        "https://drive.google.com/file/d/1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x/view",
    ),
    read=read,
    template="{} texture.",
    download=TorchvisionDownload(
        "DTD",
        moves=(("dtd/dtd/images", "images"), ("dtd/dtd/imdb", "imdb"), ("dtd/dtd/labels", "labels")),
    ),
)
