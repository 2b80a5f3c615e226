"""Bad data sets, splits, few-shot samples and lists of images, each with its sentence and exit status.

As in ``test_bad_inputs``: one line on stderr, nothing on stdout, no traceback, not a byte changed on the disk.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_calls import FAILED, Bad, a_file, expect
from miniature_sets import JPEG, WRITERS, write_jpegs
from PIL import Image
from reference_pickles import write_reference_cache

from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.few_shot import sample_shots
from cocoop_fast.data.few_shot_files import write_few_shot
from cocoop_fast.data.sets import SETS

Disk = Callable[[Path], None]


def miniature(name: str, *changes: Disk) -> Disk:
    """The set in ``data/``, changed; each change is given the set's own folder."""

    def write(folder: Path) -> None:
        WRITERS[name](folder / "data")
        for change in changes:
            change(folder / "data" / SETS[name].folder)

    return write


def without(path: str) -> Disk:
    def change(folder: Path) -> None:
        (folder / path).rename(folder / f"not {path.replace('/', ' ')}")

    return change


def holding(path: str, content: str | bytes) -> Disk:
    def change(folder: Path) -> None:
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def with_split(train: object = (), **more: object) -> Disk:
    """Textures with a split file of its own: four good classes and ``train`` besides."""
    good = [
        [f"{name}/{name}_0000.jpg", i, name]
        for i, name in enumerate(["banded", "blotchy", "cobwebbed", "zigzagged"])
    ]
    values = {
        "train": [*good, *train] if isinstance(train, (list, tuple)) else train,
        "val": [],
        "test": good,
    }
    return miniature("dtd", holding("split_zhou_DescribableTextures.json", json.dumps(values | more)))


def a_link_out(folder: Path) -> None:
    with_split([["link.jpg", 0, "banded"]])(folder)
    (folder / "secret.jpg").write_bytes(JPEG)
    (folder / "data/dtd/images/link.jpg").symlink_to(folder / "secret.jpg")


def an_image_of(width: int, height: int) -> Disk:
    def write(folder: Path) -> None:
        with_split([["huge.png", 0, "banded"]])(folder)
        Image.new("1", (width, height)).save(folder / "data/dtd/images/huge.png")

    return write


def flat_validation_images(folder: Path) -> None:
    (folder / "images/val").rename(folder / "images/sorted")
    write_jpegs(folder / "images/val", ["ILSVRC2012_val_00000001.JPEG"])


def a_pickle_that_calls(folder: Path) -> None:
    miniature("fgvc_aircraft")(folder)
    target = folder / "data/fgvc_aircraft/split_fewshot/shot_1-seed_1.pkl"
    target.parent.mkdir()
    target.write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")


def a_pickle_of_another_split(folder: Path) -> None:
    miniature("fgvc_aircraft")(folder)
    data = load_dataset(DataConfig(name="fgvc_aircraft", root=folder / "data"))
    write_reference_cache(
        data.few_shot_dir / "shot_1-seed_1.pkl", "/data/fgvc_aircraft/images", data.test[:4], ()
    )


def a_manifest(change: Callable[[Path], None]) -> Disk:
    def write(folder: Path) -> None:
        miniature("fgvc_aircraft")(folder)
        data = load_dataset(DataConfig(name="fgvc_aircraft", root=folder / "data"))
        path = write_few_shot(folder, sample_shots(data, 1, seed=1), 1, seed=1)
        change(path.rename(folder / "sample.json"))

    return write


def renamed_and_edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"1000.jpg"', '"9999.jpg"'))
    path.rename(path.with_name("shot_1-seed_1-0123456789ab.json"))


def train(name: str, more: str = "") -> str:
    return f"train -o out --dataset {name} --root data --epochs 1 --shots 1 -q {more}"


def train_list(file: str) -> str:
    return f"train -o out --root {file} --epochs 1 --shots 1 -q"


PETS, CARS, FLOWERS, AIRCRAFT = "oxford_pets", "stanford_cars", "oxford_flowers", "fgvc_aircraft"
DTD_SPLIT = "split_zhou_DescribableTextures.json"
MANIFEST = "data.few_shot sample.json"

BAD = [
    # where a published set is
    Bad("a published set without a root", "train -o out --dataset oxford_pets", "the directory that holds oxford_pets/"),
    Bad("a published set that is not there", train(PETS), "no data/oxford_pets; `cocoop-fast datasets check oxford_pets"),
    Bad(
        "a root that is the set itself",
        train(PETS).replace("--root data", "--root data/oxford_pets"),
        "so use --root data.",
        disk=miniature(PETS),
    ),
    Bad("images that are not there", train(PETS), "data/oxford_pets lacks images;", FAILED, miniature(PETS, without("images"))),
    Bad(
        "neither split nor annotations",
        train(PETS),
        "lacks split_zhou_OxfordPets.json, annotations/test.txt;",
        FAILED,
        miniature(PETS, without("annotations/test.txt")),
    ),
    Bad("an unknown set of the reference", "train -o out DATASET.NAME OfficeHome", "DATASET.NAME is 'OfficeHome'"),
    Bad("training on test images", train("imagenet_a"), "imagenet_a has test images only", disk=miniature("imagenet_a")),
    Bad("a probe of test images", train("imagenet_a", "--method linear-probe"), "linear-probe cannot be trained on it", disk=miniature("imagenet_a")),
    # split files
    Bad("a split that is no JSON", train("dtd"), "Textures.json cannot be used: it is not JSON (line 1)", FAILED, miniature("dtd", holding(DTD_SPLIT, "{"))),
    Bad("a split that is not text", train("dtd"), "Textures.json is not UTF-8 text", FAILED, miniature("dtd", holding(DTD_SPLIT, b"\xff"))),
    Bad("a split without test", train("dtd"), "must hold train, val and test lists", FAILED, with_split(test=None)),
    Bad("a split of wrong rows", train("dtd"), "row 4 of train is not [path, label, class name]", FAILED, with_split([["a"]])),
    Bad("a split that leads upwards", train("dtd"), "'../x.jpg' does not stay below", FAILED, with_split([["../x.jpg", 0, "banded"]])),
    Bad("a split with an absolute path", train("dtd"), "'/etc/passwd' is an absolute path", FAILED, with_split([["/etc/passwd", 0, "banded"]])),
    Bad("a split with a drive", train("dtd"), "is an absolute path", FAILED, with_split([["C:\\x.jpg", 0, "banded"]])),
    Bad("a split with a label that is no number", train("dtd"), "the label 'x' is not a number", FAILED, with_split([["a", "x", "a"]])),
    Bad("a split with a gap in its labels", train("dtd"), "no image has the label 4", FAILED, with_split([["a", 9, "a"]])),
    Bad("a split with two names for a label", train("dtd"), "label 0 is both 'banded' and 'dotted'", FAILED, with_split([["a", 0, "dotted"]])),
    Bad("a split with a nameless class", train("dtd"), "the class name '' is not a text", FAILED, with_split([["a", 4, ""]])),
    Bad("a split with images that are not there", train("dtd", "--subset all --shots 2"), "none.jpg (missing)", FAILED, with_split([["none.jpg", 0, "banded"]])),
    Bad("a link that leads out", train("dtd", "--shots 2"), "link.jpg (a link that leads out of data/dtd/images)", FAILED, a_link_out),
    Bad("a huge image", train("dtd", "--shots 2"), "huge.png (12000x9000 pixels, more than 89,478,485)", FAILED, an_image_of(12_000, 9_000)),
    Bad("a bomb of an image", train("dtd", "--shots 2"), "huge.png (more than 89,478,485 pixels)", FAILED, an_image_of(20_000, 10_000)),
    # annotations
    Bad("a bad line of pets", train(PETS), "trainval.txt: line 1 is 'Abyssinian'", FAILED, miniature(PETS, holding("annotations/trainval.txt", "Abyssinian"))),
    Bad("pets that lead upwards", train(PETS), "line 1: '../../a_1.jpg' does not", FAILED, miniature(PETS, holding("annotations/test.txt", "../../a_1 1 1 1"))),
    Bad("an empty list of pets", train(PETS), "test.txt is empty", FAILED, miniature(PETS, holding("annotations/test.txt", ""))),
    Bad("cars without a MATLAB file", train(CARS), "does not hold the variable 'class_names'", FAILED, miniature(CARS, holding("devkit/cars_meta.mat", "x" * 200))),
    Bad("flowers without names", train(FLOWERS), "cat_to_name.json has no name for class 2", FAILED, miniature(FLOWERS, holding("cat_to_name.json", "{}"))),
    Bad("flowers with a list of names", train(FLOWERS), "must map class numbers to names", FAILED, miniature(FLOWERS, holding("cat_to_name.json", "[]"))),
    Bad("an unknown aircraft", train(AIRCRAFT), "line 1 has 'B-17', not one of variants.txt", FAILED, miniature(AIRCRAFT, holding("images_variant_val.txt", "1 B-17"))),
    Bad("an unknown scene", train("sun397"), "line 1 has 'z/zoo', not one of ClassName.txt", FAILED, miniature("sun397", holding("Testing_01.txt", "/z/zoo/a.jpg"))),
    Bad("an unknown action", train("ucf101"), "line 1 has 'Yodel'", FAILED, miniature("ucf101", holding("ucfTrainTestlist/testlist01.txt", "Yodel/a.avi"))),
    Bad("actions without numbers", train("ucf101"), "classInd.txt: line 1 is 'YoYo'", FAILED, miniature("ucf101", holding("ucfTrainTestlist/classInd.txt", "YoYo"))),
    # ImageNet
    Bad("no class names", train("imagenet"), "data/imagenet lacks classnames.txt", FAILED, miniature("imagenet", without("classnames.txt"))),
    Bad("class names without ids", train("imagenet"), "line 1 is 'tench', not a WordNet id and a name", FAILED, miniature("imagenet", holding("classnames.txt", "tench"))),
    Bad("a class without a name", train("imagenet"), "n01443537 is not one of the classes in classnames.txt", FAILED, miniature("imagenet", holding("classnames.txt", "n01440764 tench"))),
    Bad("validation images in one folder", train("imagenet"), "sort its images into one folder a WordNet id", FAILED, miniature("imagenet", flat_validation_images)),
    Bad("a label without a folder", train("imagenetv2"), "format-val/4 is missing", FAILED, miniature("imagenetv2", without("imagenetv2-matched-frequency-format-val/4"))),
    # few-shot samples
    Bad("a few-shot file that is not there", train(AIRCRAFT, MANIFEST), "sample.json does not exist", disk=miniature(AIRCRAFT)),
    Bad("a few-shot file with all images", train(AIRCRAFT, f"--shots 0 {MANIFEST}"), "data.shots is 0", disk=a_manifest(lambda path: None)),
    Bad("a few-shot file of other shots", train(AIRCRAFT, f"--shots 2 {MANIFEST}"), "shots 1, but this run has 2", FAILED, a_manifest(lambda path: None)),
    Bad("a few-shot file of another kind", train(AIRCRAFT, MANIFEST), "is not a few-shot sample of this program", FAILED, a_manifest(lambda path: path.write_text("{}"))),
    Bad("a few-shot file that was changed", train(AIRCRAFT, "data.few_shot shot_1-seed_1-0123456789ab.json"), "was changed after", FAILED, a_manifest(renamed_and_edited)),
    Bad("a pickle that calls", train(AIRCRAFT), "asks for os.system, which a few-shot cache has no need of", FAILED, a_pickle_that_calls),
    Bad("a pickle of another split", train(AIRCRAFT), "is of another split: delete it", FAILED, a_pickle_of_another_split),
    Bad("a damaged pickle", train(AIRCRAFT, "data.few_shot x.pkl"), "x.pkl is not a readable few-shot cache", FAILED, lambda folder: (miniature(AIRCRAFT)(folder), a_file("x.pkl", pickle.dumps([1])[:-1])(folder))[0]),
    # lists of one's own images
    Bad("a list that is not there", train_list("photos.csv"), "The list of images photos.csv does not exist"),
    Bad("a list without a header", train_list("l.csv"), "l.csv begins with 'a/1.jpg,a', but needs", FAILED, a_file("l.csv", "a/1.jpg,a\na/2.jpg,a")),
    Bad("a list that leads upwards", train_list("l.csv"), "image 1: '../1.jpg' does not stay", FAILED, a_file("l.csv", "path,classname\n../1.jpg,a")),
    Bad("a list with unknown splits", train_list("l.csv"), "has the split 'eval'", FAILED, a_file("l.csv", "path,classname,split\n1.jpg,a,eval")),
    Bad("a list of one class", train_list("l.csv"), "l.csv has one class", FAILED, a_file("l.csv", "path,classname\n1.jpg,a\n2.jpg,a")),
    Bad("a list of nothing", train_list("l.json"), "l.json lists no images", FAILED, a_file("l.json", "[]")),
    Bad("a list of numbers", train_list("l.json"), "image 1 is 1, not one with the fields", FAILED, a_file("l.json", "[1]")),
    Bad("a list with absolute paths", train_list("l.json"), "is an absolute path", FAILED, a_file("l.json", '[{"path": "/a.jpg", "classname": "a"}]')),
    # the command `datasets`
    Bad("checking an unknown set", "datasets check mars --root data", "no data set called 'mars'"),
    Bad("checking without a root", "datasets check dtd", "the directory that holds dtd/"),
    Bad("downloading without a root", "datasets download dtd", "with --root DIR"),
    Bad("downloading what is one's own", "datasets download folder --root data", "nothing to download for 'folder'"),
    Bad("downloading cars", "datasets download stanford_cars --root data", "cannot be downloaded by a program; get cars_train", FAILED),
    Bad("drawing no images", "datasets sample digits --shots 0 -o .", "--shots is 0"),
    Bad("drawing to nowhere", "datasets sample digits", "with --output DIR"),
    Bad("drawing test images", "datasets sample imagenet_r --root data", "imagenet_r has test images only", disk=miniature("imagenet_r")),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_data(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad.disk(tmp_path)
    expect(bad, tmp_path, monkeypatch, capsys)
