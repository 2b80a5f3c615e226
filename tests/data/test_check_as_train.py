"""``datasets check`` accepts what training accepts, and refuses what it refuses: over generated folders and lists.

Training goes as far as it goes before its first step: images listed, drawn, opened, the model built, the run directory made.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import use_tiny_clip, write_images

from cocoop_fast import UserError, cli
from cocoop_fast.config import from_mapping
from cocoop_fast.experiments.experiment import opened
from cocoop_fast.experiments.material import Material
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.runs.recipe import resolve
from cocoop_fast.training.observer import Observer

SOME = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def check(name: str, root: Path) -> tuple[bool, str]:
    """Whether it accepts the data, and what it says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(["datasets", "check", name, "--root", str(root), "--json"])
    assert status in (0, 1, 2) and "unexpected" not in err.getvalue(), err.getvalue()
    return status == 0, out.getvalue() + err.getvalue()


def train(name: str, root: Path) -> tuple[bool, str]:
    """The same of training on all images of all classes."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = {"name": name, "root": str(root), "shots": 0, "subset": "all"}
        config, shared = from_mapping({"data": data, "output_dir": f"{folder}/run"}), Shared()
        try:
            dataset = shared.dataset(config.data)
            plan = resolve(config, dataset)
            with opened([plan], Material(plan, dataset, shared, Observer()), overwrite=False):
                return True, ""
        except UserError as error:
            return False, str(error)


def assert_alike(name: str, root: Path) -> bool:
    checked, said = check(name, root)
    trained, why = train(name, root)
    assert checked == trained, f"check: {said}\ntrain: {why or 'accepted'}"
    return checked


# -- folders ----------------------------------------------------------------------------------------------------

CLASSES = (
    "one",
    "two",
    "Two words",
    "two_words",
    "10",
    "2",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
    "train",
    "eval",
)
SPLITS = ("train", "Training", "val", "valid", "TEST", "seg_test", "extra")
FILES = {
    **{f"{seed}.png": png(seed) for seed in range(6)},
    "same.png": png(0),
    "bad.png": b"no image",
    "empty.jpg": b"",
    "cut.png": png(9)[:60],
    "Thumbs.db": b"x",
    ".hidden.png": b"x",
    "deeper/7.png": png(7),
}
ONE_CLASS = st.tuples(
    st.integers(0, 2**16),  # all images of a class differ from those of others but for "same.png"
    st.lists(st.sampled_from(sorted(FILES)), max_size=5, unique=True),
)
DIFFERENT = ("one", "two", "Two words", "10", "2", CLASSES[6])
NAMES = st.lists(st.sampled_from(DIFFERENT), min_size=2, max_size=4, unique=True)
ODD = st.dictionaries(st.sampled_from(CLASSES), ONE_CLASS, max_size=1)  # at most one class that may be bad


def good(names: Iterable[str], first_seed: int = 0) -> dict[str, tuple[int, list[str]]]:
    return {name: (first_seed + i, ["1.png", "2.png", "3.png"]) for i, name in enumerate(names)}


GOOD = good(("one", "two"))


def write_classes(folder: Path, classes: dict[str, tuple[int, list[str]]], *, nfd: bool = False) -> None:
    for name, (seed, files) in classes.items():
        place = folder / (unicodedata.normalize("NFD", name) if nfd else name)
        place.mkdir(parents=True)
        for file in files:
            (place / file).parent.mkdir(exist_ok=True)
            whole = file[0].isdigit()
            (place / file).write_bytes(png([seed, int(file[0])]) if whole else FILES[file])


@SOME
@given(NAMES, ODD)
@example(["one", "two"], {})
@example(["one", "two"], {"2": (3, ["bad.png", "1.png", "2.png"])})
@example(["one", "two"], {"word " * 40: (3, ["1.png", "2.png"])})
def test_folders_of_classes(names, odd):
    with tempfile.TemporaryDirectory() as folder:
        write_classes(Path(folder), {**good(names), **odd})
        assert_alike("folder", Path(folder))


@SOME
@given(
    NAMES,
    st.lists(st.sampled_from(SPLITS), min_size=1, max_size=3, unique=True),
    st.tuples(st.sampled_from(SPLITS), ODD),
    st.booleans(),
)
@example(["one", DIFFERENT[-1]], ["Training", "TEST"], ("TEST", {}), True)
def test_folders_of_splits(names, splits, odd, nfd):
    with tempfile.TemporaryDirectory() as folder:
        for number, split in enumerate(dict.fromkeys((*splits, *["train", "TEST"][: len(names) - 2]))):
            more = odd[1] if odd[0] == split else {}
            write_classes(Path(folder) / split, {**good(names, 10 * number), **more}, nfd=nfd and number > 0)
        assert_alike("folder", Path(folder))


# -- lists ------------------------------------------------------------------------------------------------------

ROW = st.tuples(
    st.sampled_from(
        [*(f"images/{seed}.png" for seed in range(8)), "images/bad.png", "images/none.png", "../x.png", ""]
    ),
    st.sampled_from(["cat", "dog", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "10", ""]),
    st.sampled_from(["train", "Test", "valid", "holdout", ""]),
)
GOOD_ROWS = [(f"images/{i}.png", ("cat", "dog")[i % 2], ("train", "test")[i // 2 % 2]) for i in range(8)]


@SOME
@given(
    st.one_of(
        st.lists(ROW, max_size=8), st.lists(st.sampled_from(GOOD_ROWS), min_size=4, max_size=8, unique=True)
    ),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le"]),
    st.booleans(),
    st.sampled_from(["csv", "txt", "tsv", "jsonl"]),
)
@example(GOOD_ROWS, ",", "utf-8", True, "csv")
def test_lists(rows, delimiter, encoding, with_split, ending):
    fields = ("path", "classname", "split")[: 3 if with_split else 2]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for seed in range(8):
            (root / f"images/{seed}.png").write_bytes(png(seed))
        (root / "images/bad.png").write_bytes(b"no image")
        if ending == "jsonl":
            lines = [json.dumps(dict(zip(fields, row, strict=False)), ensure_ascii=False) for row in rows]
        else:
            lines = [delimiter.join(row[: len(fields)]) for row in (fields, *rows)]
        (root / f"list.{ending}").write_bytes("\n".join(lines).encode(encoding))
        assert_alike("list", root / f"list.{ending}")


def test_what_is_good_is_accepted_by_both(tmp_path):
    for name in ("one", "two"):
        write_images(tmp_path / name, 4)
    assert assert_alike("folder", tmp_path)


# -- what check says --------------------------------------------------------------------------------------------


def test_check_lists_classes_what_is_left_out_duplicates_and_bad_images(tmp_path, capsys):
    for name in ("cat", "dog", "emu"):
        write_images(tmp_path / name, 4)
    (tmp_path / "cat/again.png").write_bytes((tmp_path / "cat/000.png").read_bytes())
    for name in ("cat/a.txt", "dog/b.txt", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    assert cli.run(["datasets", "check", "folder", "--root", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == [
        {"name": "cat", "train": 2, "val": 1, "test": 2},
        {"name": "dog", "train": 2, "val": 1, "test": 1},
        {"name": "emu", "train": 2, "val": 1, "test": 1},
    ]
    notes = " ".join(found["notes"])
    assert "1 .db, 2 .txt" in notes and "again.png" in notes and "use data.subset all" in notes
    (tmp_path / "emu/001.png").write_text("no image")
    assert cli.run(["datasets", "check", "folder", "--root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 image is not readable: emu/001.png (not an image)." in out
    assert [line.split() for line in out.splitlines() if line.split()[:1] == ["dog"]] == [
        ["dog", "2", "1", "1"]
    ]


def test_classes_without_images_of_a_split_are_told(tmp_path, capsys):
    for split, names in (("train", ("cat", "dog", "emu")), ("test", ("cat", "dog"))):
        for name in names:
            write_images(tmp_path / split / name, 2)
    assert cli.run(["datasets", "check", "folder", "--root", str(tmp_path), "--json"]) == 0
    assert "1 of 3 classes has no image to test on: 'emu'." in json.loads(capsys.readouterr().out)["notes"]
