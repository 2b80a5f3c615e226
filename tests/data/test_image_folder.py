"""Image folders: both layouts, what is ignored, and every way a folder can be wrong."""

from __future__ import annotations

from collections import Counter

import pytest
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
        write_images(tmp_path / name / "nested", 3, suffix=".JPG")
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
    with pytest.raises(UserError, match=r"no data set called 'imagnet'; choose one of digits, folder"):
        load_dataset(DataConfig(name="imagnet"))
    missing = REGISTRY["folder"].missing
    assert missing(DataConfig(name="folder", root=tmp_path)) == ()
    assert missing(DataConfig(name="folder", root=tmp_path / "x")) == (str(tmp_path / "x"),)
    assert REGISTRY["digits"].missing(DataConfig()) == ()
