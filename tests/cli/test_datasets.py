"""``cocoop-fast datasets``: listing, checking, downloading, drawing; and training on what it lists."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
from miniature_sets import WRITERS
from tiny_runs import use_tiny_clip
from torchvision import datasets

from cocoop_fast import cli
from cocoop_fast.config import DataConfig
from cocoop_fast.data import REGISTRY, load_dataset
from cocoop_fast.data.few_shot import sample_shots
from cocoop_fast.data.sets import SETS

TRAINABLE = [name for name, record in SETS.items() if record.counts[0]]


def answer(arguments, capsys, status=0):
    assert cli.run([*map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_the_listing_names_what_is_missing(tmp_path, capsys):
    WRITERS["oxford_pets"](tmp_path)
    rows = {row["name"]: row for row in answer(["datasets", "--root", tmp_path], capsys)["datasets"]}
    assert rows.keys() == REGISTRY.keys()
    assert rows["oxford_pets"]["missing"] == []
    assert rows["food101"]["missing"] == ["food-101/images"]
    assert rows["fgvc_aircraft"]["missing"][:2] == ["fgvc_aircraft/images", "fgvc_aircraft/variants.txt"]
    assert rows["ucf101"]["missing"][:2] == ["ucf101/UCF-101-midframes", "ucf101/split_zhou_UCF101.json"]
    assert cli.run(["datasets", "--root", str(tmp_path)]) == 0
    assert "oxford_pets" in capsys.readouterr().out


def test_checking_a_set_that_is_there(tmp_path, capsys):
    WRITERS["oxford_pets"](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = answer(["datasets", "check", "OxfordPets", "--root", tmp_path], capsys, status=1)
    assert (
        not found["complete"] and found["absent"] == []
    )  # nothing is missing by name, but most of it is not there
    (note,) = found["notes"]
    assert "it has 4 classes and 32 images, and not 37 and 7,349" in note
    assert found["counts"] == {"classes": 4, "train": 16, "val": 4, "test": 12}
    assert found["published"] == {"classes": 37, "train": 2944, "val": 736, "test": 3669}
    assert {part["path"]: part["there"] for part in found["parts"]} == {
        "images": True,
        "split_zhou_OxfordPets.json": False,
        "annotations/trainval.txt": True,
        "annotations/test.txt": True,
    }
    assert sorted(tmp_path.rglob("*")) == before  # looking changes nothing


def test_checking_a_set_that_is_whole(tmp_path, capsys, monkeypatch):
    WRITERS["oxford_pets"](tmp_path)
    whole = dataclasses.replace(SETS["oxford_pets"], classes=4, counts=(16, 4, 12))
    monkeypatch.setitem(SETS, "oxford_pets", whole)
    found = answer(["datasets", "check", "oxford_pets", "--root", tmp_path], capsys)
    assert found["complete"] and found["absent"] == found["notes"] == []


def test_checking_names_images_that_are_not_there(tmp_path, capsys):
    WRITERS["oxford_pets"](tmp_path)
    data = load_dataset(DataConfig(name="oxford_pets", root=tmp_path))
    (tmp_path / "oxford_pets/images" / str(data.test[0].source)).unlink()
    found = answer(["datasets", "check", "oxford_pets", "--root", tmp_path], capsys, status=1)
    assert found["absent"] == [data.test[0].source] and not found["complete"]
    assert cli.run(["datasets", "check", "oxford_pets", "--root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"1 listed image is not there: {data.test[0].source}." in out and "2,944" in out


@pytest.mark.parametrize("name", SETS)
def test_checking_says_where_to_get_everything(name, tmp_path, capsys):
    found = answer(["datasets", "check", name, "--root", tmp_path], capsys, status=1)
    assert found["counts"] is None and not any(part["there"] for part in found["parts"])
    record = SETS[name]
    expected = [*record.parts, *([record.split] if record.split else []), *record.raw]
    assert [(p["path"], p["source"]) for p in found["parts"]] == [(p.path, p.source) for p in expected]


def test_checking_data_of_ones_own(capsys):
    assert answer(["datasets", "check", "digits"], capsys)["counts"]["classes"] == 10


def test_downloading_tells_what_torchvision_does_not_have(tmp_path, capsys, monkeypatch):
    def arrive(root, download):
        print("torchvision's chatter")
        WRITERS["food101"](tmp_path / "made")
        (tmp_path / "made/food-101/meta").mkdir()
        (tmp_path / "made").rename(root + "/made")
        (tmp_path / "data/food-101/.download/made/food-101").rename(root + "/food-101")

    monkeypatch.setattr(datasets, "Food101", arrive)
    call = ["datasets", "download", "food101", "--root", str(tmp_path / "data"), "--json"]
    assert cli.run(call) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "command": "datasets download",
        "path": str(tmp_path / "data/food-101"),
        "missing": [],
    }
    assert "torchvision's chatter" in err
    assert "get split_zhou_Food101.json from https://drive.google.com" in err


def test_a_sample_on_disk_is_the_sample_of_a_run(tmp_path, capsys):
    WRITERS["oxford_pets"](tmp_path)
    call = ["datasets", "sample", "oxford_pets", "--root", tmp_path, "--shots", 2, "--seed", 3]
    written = answer(call, capsys)
    assert written["images"] == 8
    assert written["path"].startswith(str(tmp_path / "oxford_pets/split_fewshot/shot_2-seed_3-"))
    data = load_dataset(DataConfig(name="oxford_pets", root=tmp_path))
    values = json.loads(Path(written["path"]).read_text())
    assert [row[0] for row in values["train"]] == [s.source for s in sample_shots(data, 2, 3).train]
    elsewhere = answer([*call, "-o", tmp_path / "elsewhere"], capsys)
    assert elsewhere["path"].startswith(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_on_a_published_set(name, tmp_path, monkeypatch, capsys):
    use_tiny_clip(monkeypatch)
    WRITERS[name](tmp_path)
    output = tmp_path / "run"
    call = f"train --dataset {SETS[name].reference_name} --root {tmp_path} --shots 2 --epochs 1 --seed 3"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, at a schedule of one epoch
        assert cli.run([*call.split(), "-q", "-o", str(output), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 <= row["base"] <= 100 and 0 <= row["new"] <= 100
    assert f"name: {name}\n" in (output / "config.yaml").read_text()

    (manifest,) = (output / "few_shot").iterdir()
    data = load_dataset(DataConfig(name=name, root=tmp_path))
    rows = json.loads(manifest.read_text())["train"]
    assert [row[0] for row in rows] == [sample.source for sample in sample_shots(data, 2, seed=3).train]


def test_zero_shot_clip_on_a_test_set(tmp_path, monkeypatch, capsys):
    use_tiny_clip(monkeypatch)
    WRITERS["imagenet_r"](tmp_path)
    call = f"train --dataset imagenet_r --root {tmp_path} --subset all -m zeroshot -q --json -o {tmp_path / 'run'}"
    assert cli.run(call.split()) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 <= row["all"] <= 100
    assert not (tmp_path / "run/few_shot").exists()


def test_a_few_shot_sample_by_name(tmp_path, monkeypatch, capsys):
    use_tiny_clip(monkeypatch)
    WRITERS["dtd"](tmp_path)
    draw = f"datasets sample dtd --root {tmp_path} --shots 1 --seed 9 -o {tmp_path / 'samples'}"
    sample = answer(draw.split(), capsys)["path"]
    call = f"train -d dtd --root {tmp_path} --shots 1 --epochs 1 -q --no-compare -o {tmp_path / 'run'}"
    assert cli.run([*call.split(), "data.few_shot", sample]) == 0
    (manifest,) = (tmp_path / "run/few_shot").iterdir()
    assert json.loads(manifest.read_text())["train"] == json.loads(Path(sample).read_text())["train"]
