"""Image folders: both layouts, what is ignored, and every way a folder can be wrong."""

from __future__ import annotations

import json
import os
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import write_images

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import REGISTRY, load_dataset


def load(root):
    return load_dataset(DataConfig(name="folder", root=root))


def test_flat_layout_is_split_by_class(tmp_path):
    for label, name in enumerate(["red_fox", "Wolf", "polar_bear"]):
        write_images(tmp_path / name, 10 + label)
    data = load(tmp_path)
    assert data.classnames == ("Wolf", "polar bear", "red fox")  # sorted by folder name
    assert Counter(s.classname for s in data.train) == {"Wolf": 6, "polar bear": 6, "red fox": 5}
    assert Counter(s.classname for s in data.val) == {"Wolf": 2, "polar bear": 2, "red fox": 2}
    everything = (*data.train, *data.val, *data.test)
    assert len({s.source for s in everything}) == len(everything) == 33
    assert load(tmp_path).test == data.test
    assert data.read(data.train[0]).mode == "RGB"


def test_the_split_does_not_depend_on_where_the_folder_is(tmp_path):
    for root in (tmp_path / "one", tmp_path / "two" / "deep"):
        for name in "ab":
            write_images(root / name, 7)
    assert load(tmp_path / "one").train == load(tmp_path / "two" / "deep").train


def test_given_splits_are_used(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in "ab":
            write_images(tmp_path / split / name, count)
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)
    assert data.train[0].source == "train/a/000.png"


def test_val_stands_in_for_a_missing_test(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            write_images(tmp_path / split / name, 3)
    data = load(tmp_path)
    assert data.test == data.val and len(data.test) == 6


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "bus", "test"):
        write_images(tmp_path / name, 4)
    assert load(tmp_path).classnames == ("bus", "test", "train")


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    for name in "ab":
        write_images(tmp_path / name / "nested", 3, seed=ord(name), suffix=".JPG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._000.jpg").write_bytes(b"resource fork")
    write_images(tmp_path / "a" / ".cache", 2)
    write_images(tmp_path / ".thumbnails", 2)
    (tmp_path / "README.md").write_text("about")
    data = load(tmp_path)
    assert data.classnames == ("a", "b")
    assert sorted(s.source for s in (*data.train, *data.val, *data.test) if s.label == 0) == [
        f"a/nested/{i:03d}.JPG" for i in range(3)
    ]


def test_a_tiny_class_keeps_a_training_and_a_test_image(tmp_path):
    for name in "ab":
        write_images(tmp_path / name, 2)
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (2, 0, 2)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", "validation", "Testing"),
        ("TRAIN", "Valid", "TEST"),
        ("train_set", "dev", "test set"),
        ("Train-Images", "val_data", "Test.Images"),
    ],
)
def test_splits_under_other_names(tmp_path, train, val, test):
    for folder, count in ((train, 4), (val, 2), (test, 3)):
        for name in ("bus", "car"):
            write_images(tmp_path / folder / name, count)
    data = load(tmp_path)
    assert data.classnames == ("bus", "car")
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)
    (note,) = data.notes
    assert all(f"{name}/ is read as " in note for name in (train, val, test))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train/a", "train/b", "valid/a", "val/a"), "has both val/ and valid/, which mean val"),
        (("train/a", "train/b", "eval/a", "eval/b"), r"has train/ but no test/ .*\(beside it: eval/\)"),
        (("seg_train/a", "seg_train/b", "seg_test/a"), "seg_test/, seg_train/ in .* are called like splits"),
        (
            ("Training", "Testing"),
            "Testing/, Training/ in .* are called like splits, and are not read as classes",
        ),
    ],
)
def test_splits_that_are_not_understood_never_become_classes(tmp_path, folders, message):
    for folder in folders:
        write_images(tmp_path / folder, 3)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_what_is_left_out_is_counted(tmp_path):
    for name in "ab":
        write_images(tmp_path / "train" / name, 4)
        write_images(tmp_path / "val" / name, 2)
        (tmp_path / "train" / name / "IMG_1.HEIC").write_bytes(b"heic")
        (tmp_path / "train" / name / "notes").write_text("note")
        (tmp_path / "train" / name / "link.png").symlink_to("/nowhere/1.png")
        (tmp_path / "train" / name / "more").symlink_to(tmp_path / "val")
    write_images(tmp_path / "test", 5)  # as competitions have them, without classes
    write_images(tmp_path / "spare" / "c", 1)
    write_images(tmp_path, 2)
    (tmp_path / "train" / "labels.csv").write_text("")
    data = load(tmp_path)
    assert (len(data.train), len(data.test)) == (8, 4)
    assert data.notes == (
        f"Left out below {tmp_path}: 1 .csv, 2 .heic, 2 broken links, 2 files without an ending, 1 image in spare/, "
        "5 images in test/, 2 images outside of class folders, 2 links to folders.",
    )


def test_every_format_that_can_be_read_is_listed(tmp_path):
    suffixes = (".jfif", ".jpe", ".avif", ".jp2", ".tga", ".PBM", ".apng")
    for name in "ab":
        for height, suffix in enumerate(suffixes, 8):
            image = Image.new("1" if suffix == ".PBM" else "RGB", (8, height + 20 * (name == "b")), 1)
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"image{suffix}")
    data = load(tmp_path)
    samples = (*data.train, *data.val, *data.test)
    assert {Path(s.source).suffix for s in samples} == set(suffixes) and data.notes == ()
    assert all(data.read(sample).width == 8 for sample in samples)


def test_a_class_of_other_files_says_what_it_holds(tmp_path):
    write_images(tmp_path / "full", 3)
    (tmp_path / "other").mkdir()
    for i in range(2):
        (tmp_path / "other" / f"{i}.heic").write_bytes(b"heic")
    with pytest.raises(UserError, match=r"other has no images .*; it holds 2 \.heic\."):
        load(tmp_path)


def test_folders_within_a_class_are_told(tmp_path):
    for name in "ab":
        write_images(tmp_path / name, 2)
        write_images(tmp_path / name / "train" / "good", 3, seed=ord(name))
    (note,) = load(tmp_path).notes
    assert note.startswith(
        "6 images lie in folders within a class's folder, a/train/, b/train/, and are taken for"
    )


def test_one_level_too_deep(tmp_path):
    for name in ("bus", "car"):
        write_images(tmp_path / "photos" / name, 2)
    with pytest.raises(
        UserError, match=r"one class folder \(photos\).*photos holds 2 folders, bus/ .*one level too deep"
    ):
        load(tmp_path)


def test_classes_are_in_natural_order(tmp_path):
    for name in ("10", "2", "1", "img12", "img9"):
        write_images(tmp_path / name, 2)
    assert load(tmp_path).classnames == ("1", "2", "10", "img9", "img12")


def test_an_accent_is_written_in_two_ways(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for folder, name in (("train", composed), ("test", decomposed)):
        write_images(tmp_path / folder / name, 2)
        write_images(tmp_path / folder / "bar", 2)
    data = load(tmp_path)
    assert data.classnames == ("bar", composed) and {s.classname for s in data.test} == {"bar", composed}


@pytest.mark.parametrize(
    ("folders", "prompts"),
    [
        (("1", "2", "10"), '"a photo of a 1.", "a photo of a 2.", "a photo of a 10."'),
        (("n01440764", "n01443537"), '"a photo of a n01440764.", "a photo of a n01443537."'),
        (("001.Black_footed_Albatross", "gull"), '"a photo of a 001.Black footed Albatross."'),
        (("c0", "c1", "c2", "c3"), '"a photo of a c0.", "a photo of a c1.", "a photo of a c2.", ...'),
    ],
)
def test_names_that_are_no_words_are_told(tmp_path, folders, prompts):
    for name in folders:
        write_images(tmp_path / name, 2)
    (note,) = load(tmp_path).notes
    assert (
        f"look like numbers or ids, and stand in prompts as they are: {prompts}; give them names with" in note
    )


@pytest.mark.parametrize(
    "folders", [("a", "b"), ("Boeing 737", "A320 family"), ("é", "ü"), ("2CV red", "x ray")]
)
def test_other_names_are_not(tmp_path, folders):
    for name in folders:
        write_images(tmp_path / name, 2)
    assert load(tmp_path).notes == ()


NAMES = {
    "names.txt": "n01440764 tench, Tinca tinca\nn01443537 gold_fish\nn02012849 crane\n",
    "names.csv": 'folder,name\nn01440764,"tench, Tinca tinca"\nn01443537,gold_fish\n',
    "names.tsv": "n01443537\tgold_fish\nn01440764\ttench, Tinca tinca\n",
    "names.json": '{"n01440764": "tench, Tinca tinca", "n01443537": "gold_fish", "x": "y"}',
}


@pytest.mark.parametrize("file", NAMES)
def test_names_for_folders(tmp_path, file):
    for name in ("n01440764", "n01443537"):
        write_images(tmp_path / "images" / name, 3)
    (tmp_path / file).write_text(NAMES[file])
    config = DataConfig(name="folder", root=tmp_path / "images", class_names=tmp_path / file)
    data = load_dataset(config)
    assert data.classnames == ("tench, Tinca tinca", "gold fish") and data.notes == ()
    assert {s.classname for s in data.test if s.source.startswith("n01443537/")} == {"gold fish"}


def test_a_folder_whose_name_begins_another(tmp_path):
    for name in ("1", "10", "1 b"):
        write_images(tmp_path / "images" / name, 2)
    (tmp_path / "names.txt").write_text("10 ten\n1 one\n1 b: one b\n")
    config = DataConfig(name="folder", root=tmp_path / "images", class_names=tmp_path / "names.txt")
    assert set(load_dataset(config).classnames) == {"one", "ten", "one b"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("names.txt", "a bus\n", "has no name for the class folder 'b'; each needs a line `b its name`"),
        ("names.txt", "a bus\na car\nb x\n", "names 'a' both 'bus' and 'car'"),
        ("names.txt", "a bus\nb bus\n", "both mean 'bus'"),
        ("names.txt", "", "is empty"),
        ("names.json", "[1]", "not a JSON object of folders and class names"),
        ("names.json", '{"a": 1}', "not a JSON object of folders and class names"),
    ],
)
def test_files_of_names_that_are_refused(tmp_path, file, content, message):
    for name in "ab":
        write_images(tmp_path / "images" / name, 2)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_dataset(DataConfig(name="folder", root=tmp_path / "images", class_names=tmp_path / file))


def test_names_for_folders_of_a_set_without_folders(tmp_path):
    with pytest.raises(UserError, match="data set 'digits' names its own"):
        load_dataset(DataConfig(class_names=tmp_path / "names.txt"))


def _no_classes(root):
    write_images(root, 3)


def _one_class(root):
    write_images(root / "only", 3)


def _empty_class(root):
    write_images(root / "full", 3)
    (root / "void").mkdir()


def _single_image(root):
    write_images(root / "a", 3)
    write_images(root / "b", 1)


def _unknown_test_class(root):
    for path in ("train/a", "train/b", "test/a", "test/c"):
        write_images(root / path, 2)


def _no_test(root):
    for path in ("train/a", "train/b"):
        write_images(root / path, 2)


def _no_train(root):
    for path in ("test/a", "test/b"):
        write_images(root / path, 2)


def _same_name(root):
    write_images(root / "red_fox", 2)
    write_images(root / "red fox", 2)


def _nameless(root):
    write_images(root / "a", 2)
    write_images(root / "_", 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_classes, "has no class folders; expected <root>/<class>/<image>"),
        (_one_class, r"one class folder \(only\)"),
        (_empty_class, "void has no images"),
        (_single_image, "'b' has one image"),
        (_unknown_test_class, "'c' is in .*test but not among"),
        (_no_test, "nothing to test on"),
        (_no_train, r"no train/ with class folders"),
        (_same_name, "both mean 'red fox'"),
        (_nameless, "no name left"),
    ],
)
def test_wrong_folders(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value) or "images" in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is a file"):
        load(tmp_path / "file")
    with pytest.raises(UserError, match=r"--root"):
        load(None)


def test_registry_says_what_is_missing(tmp_path):
    with pytest.raises(
        UserError, match=r"no data set called 'imagnet'; did you mean imagenet\? The sets are digits"
    ):
        load_dataset(DataConfig(name="imagnet"))
    missing = REGISTRY["folder"].missing
    assert missing(DataConfig(name="folder", root=tmp_path)) == ()
    assert missing(DataConfig(name="folder", root=tmp_path / "x")) == (str(tmp_path / "x"),)
    assert REGISTRY["digits"].missing(DataConfig()) == ()


@pytest.mark.parametrize("place", ["output", "output/folder-x/cocoop/seed1"])
def test_a_directory_of_runs_is_no_class(tmp_path, place):
    for name in "abc":
        write_images(tmp_path / name, 4)
    write_images(tmp_path / place / "images", 2)  # a report's pictures
    for name in ("config.yaml", "log.txt"):
        (tmp_path / place / name).touch()
    data = load(tmp_path)
    assert data.classnames == ("a", "b", "c")
    assert f"In {tmp_path} output/ holds runs, and is not read as a class." in data.notes


def test_a_class_may_have_a_file_of_that_name(tmp_path):
    for name in "abc":
        write_images(tmp_path / name, 4)
    (tmp_path / "a/config.yaml").touch()
    assert load(tmp_path).classnames == ("a", "b", "c")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("file", ["names.txt", "names.json"])
def test_names_for_folders_in_another_unicode_form(tmp_path, form, file):
    folder = unicodedata.normalize(
        "NFC" if form == "NFD" else "NFD", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    )
    for name in (folder, "b"):
        write_images(tmp_path / "images" / name, 2)
    names = {unicodedata.normalize(form, folder): "coffee house", "b": "bar"}
    text = json.dumps(names) if file.endswith(".json") else "".join(f"{k} {v}\n" for k, v in names.items())
    (tmp_path / file).write_text(text, encoding="utf-8")
    config = DataConfig(name="folder", root=tmp_path / "images", class_names=tmp_path / file)
    assert sorted(load_dataset(config).classnames) == ["bar", "coffee house"]


@pytest.mark.parametrize(
    "outer, inner",
    [
        (("learn", "probe"), ("cat", "dog")),
        (("fold1", "fold2"), ("cat", "dog", "emu")),
        (("trainA", "testA"), ("cat", "dog")),
        (("entrenamiento", "prueba"), ("cat", "dog")),
        (("cat", "dog", "emu"), ("train", "test")),
    ],
)
def test_folders_of_the_same_folders_are_no_classes(tmp_path, outer, inner):
    for one in outer:
        for other in inner:
            write_images(tmp_path / one / other, 2, seed=zlib.crc32(f"{one}{other}".encode()))
    with pytest.raises(
        UserError, match=r"hold no images but the same folders, .*: which of them are the classes"
    ):
        load(tmp_path)


def test_folders_within_classes_may_have_one_name(tmp_path):
    for number, name in enumerate(("cat", "dog", "emu")):
        write_images(tmp_path / name / "images", 2, seed=number)
    assert load(tmp_path).classnames == ("cat", "dog", "emu")


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "lost+found"])
def test_folders_of_systems_are_passed_over(tmp_path, name):
    for number, folder in enumerate(("cat", "dog", f"{name}/cat", f"cat/{name}")):
        write_images(tmp_path / folder, 2, seed=number)
    data = load(tmp_path)
    assert data.classnames == ("cat", "dog") and len(data.train + data.val + data.test) == 4


@pytest.mark.parametrize("folder", [True, False])
def test_names_that_are_no_text_are_refused_with_the_remedy(tmp_path, folder):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 2)
    old = tmp_path / "cat" if folder else tmp_path / "cat" / "000.png"
    old.rename(old.with_name(os.fsdecode(b"caf\xe9")).with_suffix("" if folder else ".png"))
    with pytest.raises(
        UserError, match=r"is not UTF-8 text.*convmv -r --notest -f ENCODING -t utf-8"
    ) as error:
        load(tmp_path)
    assert error.value.exit_status == 1
