"""Stanford Cars (Krause et al., 2013). Its official addresses no longer answer."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.paths import relative_path
from cocoop_fast.data.sets.mat_files import read_mat
from cocoop_fast.data.sets.record import SPLIT_SEED, Part, PublishedSet
from cocoop_fast.data.split import split_trainval
from cocoop_fast.errors import UserError

_META, _TRAIN, _TEST = (
    "devkit/cars_meta.mat",
    "devkit/cars_train_annos.mat",
    "cars_test_annos_withlabels.mat",
)


def read(folder: Path) -> Splits:
    """The official training list, a fifth of it for validation, and the test list with labels."""
    names = read_mat(folder / _META, "class_names", lambda value: [str(cell[0]) for cell in value[0]])
    trainval = _listed(folder / _TRAIN, "cars_train", names)
    train, val = split_trainval(trainval, SPLIT_SEED)
    return Splits(train, val, _listed(folder / _TEST, "cars_test", names))


def year_first(name: str) -> str:
    """ "Audi TTS Coupe 2012" -> "2012 Audi TTS Coupe", as the reference has it."""
    *words, year = name.split(" ")
    return " ".join([year, *words])


def _listed(path: Path, images: str, names: list[str]) -> tuple[Sample, ...]:
    rows = read_mat(
        path,
        "annotations",
        lambda value: [(str(row["fname"][0]), int(row["class"][0][0]) - 1) for row in value[0]],
    )
    samples = []
    for file, label in rows:
        if not 0 <= label < len(names):
            raise UserError(
                f"{path}: {file} has class {label + 1}, but {_META} names {len(names)} classes.",
                exit_status=1,
            )
        samples.append(Sample(f"{images}/{relative_path(file, str(path))}", label, year_first(names[label])))
    return tuple(samples)


_DEAD = "(dead; search for a mirror)"
_DEVKIT = f"https://ai.stanford.edu/~jkrause/cars/car_devkit.tgz {_DEAD}"

SET = PublishedSet(
    name="stanford_cars",
    reference_name="StanfordCars",
    title="models of cars, 196 classes",
    folder="stanford_cars",
    images="",
    classes=196,
    counts=(6_509, 1_635, 8_041),
    parts=(
        Part("cars_train", f"http://ai.stanford.edu/~jkrause/car196/cars_train.tgz {_DEAD}"),
        Part("cars_test", f"http://ai.stanford.edu/~jkrause/car196/cars_test.tgz {_DEAD}"),
    ),
    split=Part(
        "split_zhou_StanfordCars.json",
        "https://drive.google.com/file/d/1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT/view",
    ),
    raw=(
        Part(_META, _DEVKIT),
        Part(_TRAIN, _DEVKIT),
        Part(_TEST, f"http://ai.stanford.edu/~jkrause/car196/cars_test_annos_withlabels.mat {_DEAD}"),
    ),
    read=read,
)
