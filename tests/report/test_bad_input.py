"""What cannot be reported on: one sentence, exit status 2, and nothing written."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_runs import use_tiny_clip

from cocoop_fast import cli


def damage_results(folder, change):
    file = folder / "results.json"
    results = json.loads(file.read_text())
    change(results)
    file.write_text(json.dumps(results))


def missing(folder):
    shutil.rmtree(folder)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def not_json(folder):
    (folder / "results.json").write_text('{"format": ')


def not_fields(folder):
    (folder / "results.json").write_text("[1, 2]")


def another_format(folder):
    damage_results(folder, lambda results: results.update(format="something else"))


def another_version(folder):
    damage_results(folder, lambda results: results.update(version=99))


def another_protocol(folder):
    damage_results(folder, lambda results: results.update(protocol="one-shot"))


def no_table(folder):
    damage_results(folder, lambda results: results.pop("table"))


def entry_without_mean(folder):
    damage_results(folder, lambda results: results["table"][0].pop("mean"))


def seed_that_is_no_number(folder):
    damage_results(folder, lambda results: results["table"][0].update(seeds={"one": 1.0}))


def run_outside(folder):
    damage_results(folder, lambda results: results["cells"][0].update(run_dir="../elsewhere"))


def run_without_rows(folder):
    damage_results(folder / "digits/coop/seed1", lambda results: results.update(rows=[]))


def run_with_unknown_field(folder):
    with open(folder / "digits/coop/seed1/config.yaml", "a") as file:
        file.write("colour: red\n")


def run_that_is_no_yaml(folder):
    (folder / "digits/coop/seed1/config.yaml").write_text("a: [")


def step_without_number(folder):
    with open(folder / "digits/coop/seed1/metrics.jsonl", "a") as file:
        file.write('{"event": "step"}\n')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (missing, "There is no directory"),
        (empty, "holds no run (no config.yaml) and no results of a protocol"),
        (not_json, "is damaged (it is not JSON (line 1))"),
        (not_fields, "is damaged (it holds no fields)"),
        (another_format, "holds no results of a protocol"),
        (another_version, "has format 99, and this version of cocoop_fast reads format 1"),
        (another_protocol, "There is no protocol 'one-shot'"),
        (no_table, "is damaged (KeyError('table'))"),
        (entry_without_mean, "is damaged (KeyError('mean'))"),
        (seed_that_is_no_number, "is damaged (ValueError"),
        (run_outside, "names a run outside of its directory: ../elsewhere"),
        (run_without_rows, "is damaged (IndexError"),
        (run_with_unknown_field, "`colour` is not a known field"),
        (run_that_is_no_yaml, "is not valid YAML"),
        (step_without_number, "is damaged (KeyError('step'))"),
    ],
)
def test_damaged_directories(tiny_experiment, tmp_path, capsys, monkeypatch, damage, sentence):
    use_tiny_clip(monkeypatch)
    folder = shutil.copytree(tiny_experiment, tmp_path / "runs")
    damage(folder)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert cli.run(["report", str(folder), "-o", str(tmp_path / "page")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and sentence in err
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--close-ups", "-1"], "--close-ups is -1"),
        (["--images", "0"], "--images is 0"),
        (["--images", "many"], "--images"),
        (["-o", "{file}"], "is a file; name a directory"),
        (["-o", "{file}/page"], "cannot be written"),
    ],
)
def test_wrong_options(tiny_experiment, tmp_path, capsys, monkeypatch, options, sentence):
    use_tiny_clip(monkeypatch)
    file = tmp_path / "file"
    file.write_text("mine")
    words = [word.format(file=file) for word in options]
    assert cli.run(["report", str(tiny_experiment), "-o", str(tmp_path / "page"), "-q", *words]) == (
        1 if "written" in sentence else 2
    )
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "mine"


def test_without_matplotlib(tiny_experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.run(["report", str(tiny_experiment), "-o", str(tmp_path / "page"), "-q"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
