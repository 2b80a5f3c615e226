"""SUN397 (Xiao et al., 2010): scenes, on the first official partition."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.listing import text_lines
from cocoop_fast.data.paths import relative_path
from cocoop_fast.data.sets.record import SPLIT_SEED, Part, PublishedSet, TorchvisionDownload
from cocoop_fast.data.split import split_trainval
from cocoop_fast.errors import UserError

_CLASSES, _TRAIN, _TEST = "ClassName.txt", "Training_01.txt", "Testing_01.txt"


def read(folder: Path) -> Splits:
    """Labels in the order of ``ClassName.txt``; a fifth of the training list is for validation."""
    labels = {line.removeprefix("/"): i for i, line in enumerate(text_lines(folder / _CLASSES))}
    train, val = split_trainval(_listed(folder / _TRAIN, labels), SPLIT_SEED)
    return Splits(train, val, _listed(folder / _TEST, labels))


def scene_name(path: str) -> str:
    """ "a/apartment_building/outdoor" -> "outdoor apartment_building": without the letter, parts reversed."""
    return " ".join(reversed(path.split("/")[1:]))


def _listed(path: Path, labels: dict[str, int]) -> tuple[Sample, ...]:
    """Lines "/a/abbey/sun_aaalbzqrimafwbiv.jpg"."""
    samples = []
    for number, line in enumerate(text_lines(path), start=1):
        source = relative_path(line.removeprefix("/"), f"{path}: line {number}")
        scene = source.rpartition("/")[0]
        if scene not in labels:
            raise UserError(f"{path}: line {number} has {scene!r}, not one of {_CLASSES}.", exit_status=1)
        samples.append(Sample(source, labels[scene], scene_name(scene)))
    return tuple(samples)


_PARTITIONS = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"

SET = PublishedSet(
    name="sun397",
    reference_name="SUN397",
    title="scenes, 397 classes",
    folder="sun397",
    images="SUN397",
    classes=397,
    counts=(15_880, 3_970, 19_850),
    parts=(
        Part(
            "SUN397",
            "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz (it does not always answer; mirrors exist)",
        ),
    ),
    split=Part(
        "split_zhou_SUN397.json", "https://drive.google.com/file/d/1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq/view"
    ),
    raw=tuple(Part(path, _PARTITIONS) for path in (_CLASSES, _TRAIN, _TEST)),
    read=read,
    download=TorchvisionDownload("SUN397", moves=(("SUN397", "SUN397"),)),
)
