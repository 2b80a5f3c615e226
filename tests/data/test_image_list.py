"""Your own images in a CSV or JSON file: every form, and every way it can be wrong."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from miniature_sets import write_jpegs
from tiny_runs import write_images

from cocoop_fast import UserError
from cocoop_fast.cli import configuration
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset


def load(path):
    return load_dataset(DataConfig(name="list", root=path))


def rows(split=None):
    """Ten images of each of two classes."""
    return [
        {"path": f"{name}/{i}.jpg", "classname": name} | ({} if split is None else {"split": split(i)})
        for name in ("wolf", "red_fox")
        for i in range(10)
    ]


def as_csv(path, values):
    lines = [",".join(values[0]), *(",".join(map(str, row.values())) for row in values)]
    path.write_text("\n".join(lines) + "\n")
    return path


def as_json(path, values):
    path.write_text(json.dumps(values))
    return path


WRITE = {".csv": as_csv, ".json": as_json}


@pytest.mark.parametrize("ending", WRITE)
def test_without_splits_each_class_is_cut(tmp_path, ending):
    data = load(WRITE[ending](tmp_path / f"list{ending}", rows()))
    assert data.classnames == ("red fox", "wolf")  # numbered by name
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        assert Counter(s.classname for s in getattr(data, split)) == {"red fox": count, "wolf": count}
    write_jpegs(tmp_path / "wolf", [f"{i}.jpg" for i in range(10)])
    wolf = next(s for s in data.train if s.classname == "wolf")
    assert data.read(wolf).size == (24, 18)


@pytest.mark.parametrize("ending", WRITE)
def test_given_splits_and_labels(tmp_path, ending):
    values = rows(lambda i: "train" if i < 6 else "test")
    for row in values:
        row["label"] = 0 if row["classname"] == "wolf" else 1
    data = load(WRITE[ending](tmp_path / f"list{ending}", values))
    assert data.classnames == ("wolf", "red fox")
    assert (len(data.train), len(data.val), len(data.test)) == (12, 0, 8)
    assert data.train[0].source == "wolf/0.jpg"


def test_val_stands_in_for_a_missing_test(tmp_path):
    data = load(as_csv(tmp_path / "list.csv", rows(lambda i: "train" if i < 6 else "val")))
    assert data.test == data.val and len(data.test) == 8


def test_a_published_split_file_is_a_list(tmp_path):
    split = {"train": [["a/1.jpg", 1, "b_c"], ["a/2.jpg", 0, "a"]], "val": [], "test": [["a/3.jpg", 0, "a"]]}
    data = load(as_json(tmp_path / "split.json", split))
    assert data.classnames == ("a", "b c") and data.test[0].source == "a/3.jpg"


def test_a_list_as_spreadsheets_write_it(tmp_path):
    path = tmp_path / "list.csv"
    lines = [
        "classname,path",
        '"cat, tabby",a\\1.jpg',
        '"cat, tabby",a\\2.jpg',
        "dog,b\\1.jpg",
        "dog,b\\2.jpg",
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    data = load(path)
    assert data.classnames == ("cat, tabby", "dog")
    assert {s.source for s in (*data.train, *data.test)} == {"a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"}


def test_the_file_alone_says_that_it_is_a_list(tmp_path):
    for name, expected in (("photos.csv", "list"), ("split.JSON", "list"), ("photos", "folder")):
        built = configuration.build(options={"data.root": ("--root", tmp_path / name)})
        assert built.config.data.name == expected


def table(between, header=("path", "classname"), more=(), split=None):
    """Five images of each of two classes, as a spreadsheet may write them."""
    lines = [between.join((*header, *more))]
    for name in ("caf\u00e9", "bar"):
        for i in range(5):
            row = [f"{name}/{i}.jpg", name, *(() if split is None else (split(i),)), *("7" for _ in more)]
            lines.append(between.join(row))
    return "\r\n".join(lines) + "\r\n"


SPREADSHEETS = {
    "semicolon.csv": (table(";"), "utf-8"),
    "tab.csv": (table("\t"), "utf-8"),
    "tab.tsv": (table("\t"), "utf-8-sig"),
    "bar.txt": (table("|"), "utf-8"),
    "space.csv": (table(", "), "utf-8"),
    "case.csv": (table(",", ("Path ", "Class Name")), "utf-8"),
    "said.csv": ("sep=;\r\n" + table(";"), "utf-8"),
    "empty.csv": (table(",").replace("\r\n", ",,\r\n") + ",,,\r\n\r\n", "utf-8"),
    "utf16.csv": (table("\t"), "utf-16"),
    "big.csv": ("\ufeff" + table(";"), "utf-16-be"),
}


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_tables_as_spreadsheets_write_them(tmp_path, name):
    text, encoding = SPREADSHEETS[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    data = load(tmp_path / name)
    assert data.classnames == ("bar", "caf\u00e9") and data.notes == ()
    sources = sorted(str(s.source) for s in (*data.train, *data.val, *data.test))
    assert sources == sorted(f"{name}/{i}.jpg" for name in data.classnames for i in range(5))


def test_other_columns_are_not_used_and_told(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(table(",", more=("id", "Weight")), encoding="utf-8")
    assert load(path).notes == (f"Not used of {path}: id, Weight.",)
    path = as_json(tmp_path / "list.json", [row | {"id": 3} for row in rows()])
    assert load(path).notes == (f"Not used of {path}: id.",)


def test_a_line_of_json_an_image(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows()) + "\n")
    assert load(path).classnames == ("red fox", "wolf")
    path.write_text('{"path": "a.jpg", "classname": "a"}\n{"path"\n')
    with pytest.raises(UserError, match="row 2 cannot be used: it is not JSON"):
        load(path)


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "validation"), (" TRAIN ", "valid"), ("train_set", "dev")],
)
def test_splits_as_people_call_them(tmp_path, train, test):
    path = tmp_path / "list.csv"
    header = ("path", "classname", "Split")
    path.write_text(table(",", header, split=lambda i: train if i < 3 else test), encoding="utf-8")
    data = load(path)
    assert (len(data.train), len(data.test)) == (6, 4)


def test_classes_of_a_list_are_in_natural_order(tmp_path):
    values = [{"path": f"{name}/{i}.jpg", "classname": name} for name in ("10", "9") for i in range(3)]
    data = load(as_csv(tmp_path / "list.csv", values))
    assert data.classnames == ("9", "10")
    assert "look like numbers or ids" in data.notes[0] and "write names in `classname`" in data.notes[0]


CSV = {
    "file,classname\na,b": "begins with 'file,classname', but needs a header",
    "path,label\na,b": "needs a header `path,classname`",
    "path,path,classname\na,a,b": "needs a header",
    "Path;Class\na;b": "begins with 'Path;Class', but needs a header",
    "path,classname\na/1.jpg": r"image 1 \(a/1.jpg\) has no classname",
    "path,classname\na/1.jpg,a,b,c": "image 1 is .* not one with the fields",
    "path,classname\n../1.jpg,a": r"list\.csv: image 1: '\.\./1\.jpg' does not stay below",
    "path,classname\n/etc/passwd,a": "is an absolute path",
    "path,classname": "lists no images",
    "": "is empty",
    "path,classname,label\na,x,0\nb,y,": "gives some images a label and others none",
    "path,classname,split\na,x,train\nb,y,": "gives some images a split and others none",
    "path,classname,split\na,x,holdout": "has the split 'holdout', not one of train, val, test",
    "path,classname,label\na,x,one": "has the label 'one', not an integer from 0",
    "path,classname,label\na,x,1\nb,x,1\nc,y,2\nd,y,2": "no image has the label 0",
    "path,classname,label\na,x,0\nb,y,0": "label 0 is both 'x' and 'y'",
    "path,classname\na,x\nb,x": "has one class",
    "path,classname\na,x\nb,x\nc,y": "Class 'y' has one image",
    "path,classname,split\na,x,train\nb,y,train": "images to train on and to test on",
    "path,classname,split\na,x,test\nb,y,test": "images to train on and to test on",
}


@pytest.mark.parametrize("content", CSV)
def test_csv_files_that_are_refused(tmp_path, content):
    path = tmp_path / "list.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=CSV[content]):
        load(path)


JSON = {
    "3": "holds neither a list of images nor a split",
    "[]": "lists no images",
    "[3]": "image 1 is 3, not one with the fields",
    '[{"path": 3, "classname": "a"}]': "3 is not a path",
    '[{"path": "a.jpg"}]': "has no classname",
    '[{"path": "a.jpg", "classname": "a", "label": 1.5}]': "has the label 1.5",
    '[{"path": "a.jpg", "classname": "a", "label": true}]': "has the label True",
    '{"a": ["a.jpg"]}': "must hold train, val and test lists",
    "[{]": "it is not JSON",
}


@pytest.mark.parametrize("content", JSON)
def test_json_files_that_are_refused(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(UserError, match=JSON[content]):
        load(path)


def test_what_is_no_list(tmp_path):
    with pytest.raises(UserError, match=r"needs data\.root"):
        load(None)
    with pytest.raises(
        UserError, match=r"reads \.csv, \.tsv, \.txt, \.json, \.jsonl files, .* save the table as CSV"
    ):
        load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.csv")
    (tmp_path / "list.csv").write_bytes(b"path,classname\n\xff,a")
    with pytest.raises(UserError, match=r"is not UTF-8 text; save it in that encoding .*CSV UTF-8"):
        load(tmp_path / "list.csv")


# -- names in more than one form --------------------------------------------------------------------------------

NFC, NFD = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"


def listed(folder, names):
    """Two images of each name, which are made."""
    write_images(folder / "images", 2 * len(names))
    rows = [f"images/{i:03d}.png,{name}" for i, name in enumerate(name for name in names for _ in range(2))]
    (folder / "list.csv").write_text("\n".join(["path,classname", *rows]), encoding="utf-8")
    return load_dataset(DataConfig(name="list", root=folder / "list.csv"))


@pytest.mark.parametrize("other", [NFD, f" {NFC} ", f"{NFC}\N{ZERO WIDTH SPACE}"])
def test_names_that_look_alike_are_one_class(tmp_path, other):
    assert listed(tmp_path, [NFC, other, "dog"]).classnames == (NFC, "dog")


def test_names_that_become_one_in_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="class names 'big dog' and 'big_dog' both mean 'big dog'"):
        listed(tmp_path, ["big dog", "big_dog", "cat"])


@pytest.mark.parametrize("in_list, on_disk", [(NFC, NFD), (NFD, NFC)])
def test_paths_in_another_unicode_form_are_found(tmp_path, in_list, on_disk):
    write_images(tmp_path / on_disk, 4)
    rows = [f"{in_list}/{i:03d}.png,{('cat', 'dog')[i % 2]}" for i in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(["path,classname", *rows]), encoding="utf-8")
    data = load_dataset(DataConfig(name="list", root=tmp_path / "list.csv"))
    assert data.read(data.train[0]).size == (29, 24)


@pytest.mark.parametrize("encoding", ["utf-32", "utf-16-le", "utf-16-be"])
def test_encodings_that_are_not_read_are_refused(tmp_path, encoding):
    (tmp_path / "list.csv").write_bytes("path,classname\na.png,cat\nb.png,dog\n".encode(encoding))
    with pytest.raises(
        UserError, match="has zero bytes, so it is not text, or in an encoding that is not read"
    ):
        load_dataset(DataConfig(name="list", root=tmp_path / "list.csv"))


def test_characters_that_end_a_line_elsewhere_stand_in_names(tmp_path):
    write_images(tmp_path, 4)
    rows = [{"path": f"{i:03d}.png", "classname": ("c\u2028at", "dog")[i % 2]} for i in range(4)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "list.jsonl").write_text(text, encoding="utf-8", newline="")
    assert load_dataset(DataConfig(name="list", root=tmp_path / "list.jsonl")).classnames == ("c at", "dog")
