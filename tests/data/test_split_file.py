"""Split files: read as published, and nothing in them leads out of the images' directory."""

from __future__ import annotations

import json

import pytest
from miniature_sets import JPEG, WRITERS

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import Sample, load_dataset
from cocoop_fast.data.check import check_images
from cocoop_fast.data.dataset import Splits, named_classes
from cocoop_fast.data.paths import relative_path
from cocoop_fast.data.split_file import read_split, write_split


def split(path, **lists):
    path.write_text(json.dumps({"train": [], "val": [], "test": [], **lists}))
    return path


def test_what_is_written_is_read(tmp_path):
    splits = Splits((Sample("a/1.jpg", 0, "a b_c"),), (), (Sample("ä/2.jpg", 1, "ä"),))
    write_split(tmp_path / "split.json", splits)
    assert read_split(tmp_path / "split.json") == splits
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b.jpg", "a/b.jpg"), ("./a//b.jpg", "a/b.jpg"), ("a\\b.jpg", "a/b.jpg"), ("..a", "..a")],
)
def test_paths_below_the_directory(text, expected):
    assert relative_path(text, "here") == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("../a.jpg", "does not stay below"),
        ("a/../../b.jpg", "does not stay below"),
        ("a/..", "does not stay below"),
        ("..\\a.jpg", "does not stay below"),
        (".", "does not stay below"),
        ("/etc/passwd", "is an absolute path"),
        ("\\\\server\\share", "is an absolute path"),
        ("C:\\a.jpg", "is an absolute path"),
        ("c:a.jpg", "is an absolute path"),
        ("", "is not a path"),
        (" ", "is not a path"),
        ("a\0.jpg", "is not a path"),
        (3, "is not a path"),
        (None, "is not a path"),
    ],
)
def test_paths_that_are_refused(text, says):
    with pytest.raises(UserError, match=f"^here: .*{says}"):
        relative_path(text, "here")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"train": []}', "must hold train, val and test lists"),
        ("[]", "must hold train, val and test lists"),
        ('{"train": [', r"it is not JSON \(line 1\)"),
        ("[" * 100_000, "it is nested too deeply"),
        (
            '{"train": [["a.jpg", 0]], "val": [], "test": []}',
            r"row 0 of train is not \[path, label, class name\]",
        ),
        ('{"train": ["abc"], "val": [], "test": []}', "row 0 of train is not"),
        ('{"train": [["a.jpg", "x", "a"]], "val": [], "test": []}', "the label 'x' is not a number"),
        ('{"train": [["a.jpg", true, "a"]], "val": [], "test": []}', "the label True is not a number"),
        ('{"train": [["a.jpg", 0, ""]], "val": [], "test": []}', "the class name '' is not a text"),
        ('{"train": [], "val": [["../a.jpg", 0, "a"]], "test": []}', "row 0 of val: .* does not stay below"),
    ],
)
def test_files_that_are_refused(tmp_path, content, says):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        read_split(path)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a", 0, "x"), ("b", 2, "y")], "no image has the label 1, but labels go up to 2"),
        ([("a", 1, "x")], "no image has the label 0"),
        ([("a", -1, "x"), ("b", 0, "y")], "must be 0, 1, 2"),
        ([("a", 0, "x"), ("b", 0, "y")], r"label 0 is both 'x' and 'y' \(b\)"),
        ([("a", 0, "__")], "'__' has no letters"),
    ],
)
def test_classes_that_are_refused(rows, says):
    splits = Splits(tuple(Sample(*row) for row in rows), (), ())
    with pytest.raises(UserError, match=says):
        named_classes(splits, "here")


def test_a_link_in_a_data_set_leads_nowhere_else(tmp_path):
    """An unpacked archive may hold a link, and a split file that came with it may name that link."""
    WRITERS["food101"](tmp_path / "data")
    config = DataConfig(name="food101", root=tmp_path / "data")
    data = load_dataset(config)
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    victim = tmp_path / "data/food-101/images" / str(data.train[0].source)
    victim.unlink()
    victim.symlink_to(tmp_path / "secret.jpg")
    data = load_dataset(config)
    with pytest.raises(UserError, match=rf"{data.train[0].source} \(a link that leads out of"):
        check_images(data)
    victim.unlink()
    victim.symlink_to(tmp_path / "data/food-101/images" / str(data.train[1].source))  # within: fine
    check_images(load_dataset(config))
