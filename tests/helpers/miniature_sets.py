"""The 15 published data sets in miniature, in the directory layout that they have, with what is odd about them.

Each function writes one set below a root, without a split file, and with a few images a class.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

WNIDS = {
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n01484850": "great white shark",
    "n02012849": "crane",
    "n03126707": "crane",  # ImageNet has the bird and the machine
}


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 18)).convert("RGB").save(file, "JPEG")
    return file.getvalue()


JPEG = _jpeg()


def write_jpegs(folder: Path, names: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(JPEG)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def caltech101(root: Path) -> None:
    counts = {"BACKGROUND_Google": 2, "Faces": 10, "Faces_easy": 2, "Leopards": 10, "Motorbikes": 10,
              "accordion": 11, "airplanes": 10}  # fmt: skip
    for name, count in counts.items():
        write_jpegs(
            root / "caltech-101/101_ObjectCategories" / name,
            [f"image_{i:04d}.jpg" for i in range(1, count + 1)],
        )


def food101(root: Path) -> None:
    for name in ("apple_pie", "baklava", "beef_tartare", "bibimbap"):
        write_jpegs(root / "food-101/images" / name, [f"{i}.jpg" for i in range(10)])
    (root / "food-101/images/.DS_Store").write_bytes(b"hidden")


def dtd(root: Path) -> None:
    for name in ("banded", "blotchy", "cobwebbed", "crosshatched", "zigzagged"):
        write_jpegs(root / "dtd/images" / name, [f"{name}_{i:04d}.jpg" for i in range(6)])
        # Some folders of the real set have it.
        (root / "dtd/images" / name / ".directory").write_bytes(b"hidden")


def eurosat(root: Path) -> None:
    for name in ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
                 "PermanentCrop", "Residential", "River", "SeaLake"):  # fmt: skip
        write_jpegs(root / "eurosat/2750" / name, [f"{name}_{i}.jpg" for i in range(1, 11)])


PETS = ("Abyssinian", "american_bulldog", "American_Curl", "yorkshire_terrier")


def oxford_pets(root: Path) -> None:
    folder = root / "oxford_pets"
    for split, numbers in (("trainval", range(10, 15)), ("test", range(20, 23))):
        # The lists are not in order of class.
        rows = [(f"{breed}_{i}", label) for i in numbers for label, breed in reversed([*enumerate(PETS, 1)])]
        write_lines(folder / f"annotations/{split}.txt", [f"{image} {label} 1 1" for image, label in rows])
        write_jpegs(folder / "images", [f"{image}.jpg" for image, _ in rows])
    (folder / "images/Abyssinian_100.mat").write_bytes(b"the real set has such files")


CARS = (
    "AM General Hummer SUV 2000",
    "Acura RL Sedan 2012",
    "Ram C/V Cargo Van Minivan 2012",
    "smart fortwo 2012",
)


def stanford_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.empty((1, len(CARS)), dtype=object)
    names[0] = CARS
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    for images, path, labels in (
        ("cars_train", "devkit/cars_train_annos.mat", [3, 1, 2, 4] * 5),
        ("cars_test", "cars_test_annos_withlabels.mat", [1, 2, 3, 4] * 2),
    ):
        files = [f"{i:05d}.jpg" for i in range(1, len(labels) + 1)]
        rows = np.empty((1, len(labels)), dtype=[("bbox_x1", object), ("class", object), ("fname", object)])
        for i, (label, file) in enumerate(zip(labels, files, strict=True)):
            rows[0, i] = (np.array([[5]]), np.array([[label]], dtype=np.uint8), file)
        savemat(folder / path, {"annotations": rows})
        write_jpegs(folder / images, files)


FLOWERS = {"1": "pink primrose", "2": "hard-leaved pocket orchid", "3": "colt's foot", "4": "sword lily"}


def oxford_flowers(root: Path) -> None:
    folder = root / "oxford_flowers"
    labels = [2, 1, 4, 3] * 10
    write_jpegs(folder / "jpg", [f"image_{i:05d}.jpg" for i in range(1, len(labels) + 1)])
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    (folder / "cat_to_name.json").write_text(json.dumps(dict(reversed(FLOWERS.items()))))


# Not in alphabetical order here, so that order shows.
VARIANTS = ("707-320", "Model B200", "A300B4", "Yak-42")


def fgvc_aircraft(root: Path) -> None:
    folder = root / "fgvc_aircraft"
    write_lines(folder / "variants.txt", VARIANTS)
    for first, split, count in ((1000, "train", 3), (2000, "val", 2), (3000, "test", 2)):
        rows = [(f"{first + i}", variant) for i, variant in enumerate(sorted(VARIANTS) * count)]
        write_lines(folder / f"images_variant_{split}.txt", [" ".join(row) for row in rows])
        write_jpegs(folder / "images", [f"{image}.jpg" for image, _ in rows])


SCENES = ("/a/abbey", "/a/apartment_building/outdoor", "/b/bedroom", "/c/cathedral/indoor")


def sun397(root: Path) -> None:
    folder = root / "sun397"
    write_lines(folder / "ClassName.txt", SCENES)
    for split, count in (("Training", 5), ("Testing", 2)):
        files = [
            f"{scene}/sun_{split[:2].lower()}{i}.jpg" for scene in reversed(SCENES) for i in range(count)
        ]
        write_lines(folder / f"{split}_01.txt", files)
        for file in files:
            write_jpegs((folder / "SUN397" / file[1:]).parent, [file.rpartition("/")[2]])


ACTIONS = ("ApplyEyeMakeup", "BasketballDunk", "Biking", "YoYo")


def ucf101(root: Path) -> None:
    folder = root / "ucf101"
    write_lines(folder / "ucfTrainTestlist/classInd.txt", [f"{i} {a}" for i, a in enumerate(ACTIONS, 1)])
    folders = ("Apply_Eye_Makeup", "Basketball_Dunk", "Biking", "Yo_Yo")
    for split, first, count in (("trainlist01", 8, 5), ("testlist01", 1, 2)):
        lines = []
        for label, (action, frames) in enumerate(zip(ACTIONS, folders, strict=True), 1):
            clips = [f"v_{action}_g{first + i:02d}_c01" for i in range(count)]
            lines += [
                f"{action}/{clip}.avi" + (f" {label}" if split == "trainlist01" else "") for clip in clips
            ]
            write_jpegs(folder / "UCF-101-midframes" / frames, [f"{clip}.jpg" for clip in clips])
        write_lines(folder / f"ucfTrainTestlist/{split}.txt", lines)


def _classnames(folder: Path) -> None:
    write_lines(folder / "classnames.txt", [f"{wnid} {name}" for wnid, name in WNIDS.items()])


def imagenet(root: Path) -> None:
    folder = root / "imagenet"
    for wnid in reversed(WNIDS):
        write_jpegs(folder / "images/train" / wnid, [f"{wnid}_{i}.JPEG" for i in (10, 9, 2, 41, 30, 7)])
        write_jpegs(folder / "images/val" / wnid, [f"ILSVRC2012_val_{wnid[-3:]}{i}.JPEG" for i in (5, 1)])
    _classnames(folder)


def imagenetv2(root: Path) -> None:
    folder = root / "imagenetv2"
    for label in range(len(WNIDS)):
        write_jpegs(
            folder / "imagenetv2-matched-frequency-format-val" / str(label), [f"{c * 4}.jpeg" for c in "ba"]
        )
    _classnames(folder)


def imagenet_sketch(root: Path) -> None:
    folder = root / "imagenet-sketch"
    for wnid in WNIDS:
        write_jpegs(folder / "images" / wnid, ["sketch_1.JPEG", "sketch_0.JPEG"])
    (folder / "images/notes.txt").write_text("a stray file, at which the reference stops")
    _classnames(folder)


def _some_classes(folder: Path, images: str, wnids: Iterable[str]) -> None:
    for wnid in wnids:
        write_jpegs(folder / images / wnid, ["0.0_a.jpg", "0.0_b.jpg"])
    (folder / images / "README.txt").write_text("as in the archive")
    _classnames(folder)


def imagenet_a(root: Path) -> None:
    _some_classes(root / "imagenet-adversarial", "imagenet-a", ("n03126707", "n01443537"))


def imagenet_r(root: Path) -> None:
    _some_classes(root / "imagenet-rendition", "imagenet-r", ("n01484850", "n01440764", "n02012849"))


WRITERS: dict[str, Callable[[Path], None]] = {
    writer.__name__: writer
    for writer in (
        imagenet, caltech101, oxford_pets, stanford_cars, oxford_flowers, food101, fgvc_aircraft, sun397, dtd,
        eurosat, ucf101, imagenetv2, imagenet_sketch, imagenet_a, imagenet_r,
    )
}  # fmt: skip
