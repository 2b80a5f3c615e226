"""UCF101 (Soomro et al., 2012): the middle frame of each clip, on the first official split."""

from __future__ import annotations

import re
from pathlib import Path

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.listing import text_lines
from cocoop_fast.data.paths import relative_path
from cocoop_fast.data.sets.record import SPLIT_SEED, Part, PublishedSet
from cocoop_fast.data.split import split_trainval
from cocoop_fast.errors import UserError

_CLASSES, _TRAIN, _TEST = (f"ucfTrainTestlist/{n}.txt" for n in ("classInd", "trainlist01", "testlist01"))


def read(folder: Path) -> Splits:
    """Labels from ``classInd.txt``, which counts from 1; a fifth of the training list is for validation."""
    labels = {}
    for number, line in enumerate(text_lines(folder / _CLASSES), start=1):
        label, _, action = line.partition(" ")
        if not label.isdecimal() or not action:
            raise UserError(
                f"{folder / _CLASSES}: line {number} is {line!r}, not a number and a class.", exit_status=1
            )
        labels[action] = int(label) - 1
    train, val = split_trainval(_listed(folder / _TRAIN, labels), SPLIT_SEED)
    return Splits(train, val, _listed(folder / _TEST, labels))


def action_name(camel: str) -> str:
    """ "ApplyEyeMakeup" -> "Apply_Eye_Makeup", which is also the name of the frames' folder."""
    return "_".join(re.findall("[A-Z][^A-Z]*", camel))


def _listed(path: Path, labels: dict[str, int]) -> tuple[Sample, ...]:
    """Lines "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"; the label is not in the test list."""
    samples = []
    for number, line in enumerate(text_lines(path), start=1):
        where = f"{path}: line {number}"
        action, _, clip = relative_path(line.split(" ")[0], where).partition("/")
        if action not in labels or not clip:
            raise UserError(f"{where} has {action!r}, not one of {_CLASSES}.", exit_status=1)
        name = action_name(action)
        samples.append(Sample(f"{name}/{clip.replace('.avi', '.jpg')}", labels[action], name))
    return tuple(samples)


_LISTS = "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip"

SET = PublishedSet(
    name="ucf101",
    reference_name="UCF101",
    title="human actions, 101 classes",
    folder="ucf101",
    images="UCF-101-midframes",
    classes=101,
    counts=(7_639, 1_898, 3_783),
    parts=(
        Part(
            "UCF-101-midframes",
            "https://drive.google.com/file/d/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O/view (UCF-101-midframes.zip)",
        ),
    ),
    split=Part(
        "split_zhou_UCF101.json", "https://drive.google.com/file/d/1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y/view"
    ),
    raw=tuple(Part(path, _LISTS) for path in (_CLASSES, _TRAIN, _TEST)),
    read=read,
    template="a photo of a person doing {}.",
)
