"""The same image twice, in folders and in lists, whatever it is called."""

from __future__ import annotations

import os
import shutil

import pytest
from tiny_runs import write_images

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            write_images(tmp_path / split / name, 4, suffix=".bmp")  # all of one size
    return tmp_path


def load(root):
    return load_dataset(DataConfig(name="list" if root.is_file() else "folder", root=root))


def list_of(root, rows, header="path,classname,split"):
    path = root / "list.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_different_images_of_one_size_are_no_duplicates(root):
    assert load(root).notes == ()


def test_an_image_that_is_trained_and_tested_on(root):
    shutil.copy(root / "train/a/000.bmp", root / "test/a/copy.bmp")
    assert load(root).notes == (
        f"1 image is in {root} both for training and for testing: train/a/000.bmp in train = test/a/copy.bmp in test.",
    )


def test_an_image_that_is_there_twice(root):
    for i in range(2):
        shutil.copy(root / f"train/a/00{i}.bmp", root / f"train/a/copy{i}.bmp")
    assert load(root).notes == (
        f"2 images are in {root} more than once: train/a/000.bmp = train/a/copy0.bmp; "
        "train/a/001.bmp = train/a/copy1.bmp.",
    )


def test_an_image_of_two_classes_is_refused(root):
    shutil.copy(root / "train/a/000.bmp", root / "test/b/copy.bmp")
    with pytest.raises(
        UserError, match=r"under two classes: train/a/000.bmp in 'a' = test/b/copy.bmp in 'b'; leave"
    ) as caught:
        load(root)
    assert caught.value.exit_status == 1


def test_files_that_differ_in_one_byte_are_different(root):
    content = bytearray((root / "train/a/000.bmp").read_bytes())
    content[-1] ^= 1
    (root / "test/b/other.bmp").write_bytes(bytes(content) + bytes(20_000))
    content[-1] ^= 3  # not in the middle, which is looked at first
    (root / "test/a/other.bmp").write_bytes(bytes(content) + bytes(20_000))
    assert load(root).notes == ()


def test_rows_that_repeat_are_left_out(root):
    rows = [
        f"{split}/{name}/00{i}.bmp,{name},{split}"
        for split in ("train", "test")
        for name in "ab"
        for i in range(4)
    ]
    path = list_of(root, [*rows, *rows[:3]])
    data = load(path)
    assert (len(data.train), len(data.test)) == (8, 8)
    assert data.notes == (f"3 of the 19 rows of {path} repeat others and are left out.",)


def test_a_list_that_leaks(root):
    path = list_of(
        root,
        [f"train/{n}/00{i}.bmp,{n},{s}" for n in "ab" for i in range(4) for s in ("train", "validation")],
    )
    (note,) = load(path).notes
    assert note.startswith(
        f"8 images are in {path} both for training and for testing: train/a/000.bmp in train = "
    )


def test_a_path_under_two_classes(root):
    """Also where there is no such file, which is told when images are checked."""
    path = list_of(root, ["x/1.bmp,a", "x/2.bmp,a", "x/3.bmp,b", "x/4.bmp,b", "x/1.bmp,b"], "path,classname")
    with pytest.raises(
        UserError, match=r"1 image is in .* under two classes: x/1.bmp in '.' = x/1.bmp in '.'"
    ):
        load(path)


def test_what_is_no_file_is_not_waited_for(root):
    os.mkfifo(root / "train/a/pipe.bmp")
    path = list_of(
        root,
        [
            f"train/a/{name}.bmp,{c},{s}"
            for name, c, s in (("pipe", "a", "train"), ("000", "b", "test"), ("pipe", "a", "train"))
        ],
    )
    assert load(path).classnames == ("a", "b")


def test_published_sets_are_taken_as_they_are(tmp_path):
    from miniature_sets import WRITERS

    WRITERS["dtd"](tmp_path)  # all images are the same one
    (note,) = load_dataset(DataConfig(name="dtd", root=tmp_path)).notes
    assert "as published" in note
