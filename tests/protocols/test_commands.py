"""``run`` and ``sweep``: options in, table and files out, one sentence for what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_protocols import folders
from tiny_runs import use_tiny_clip

from cocoop_fast import cli
from cocoop_fast.experiments import shared
from cocoop_fast.protocols import run_cell

SHORT = ("--shots", "2", "optim.epochs", "1")


@pytest.fixture
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


def result(capsys):
    return json.loads(capsys.readouterr().out)


def test_run_prints_the_table_and_writes_the_files(tmp_path, capsys, tiny):
    call = ["run", "base2new", "--datasets", "digits", "--seeds", "1", "2", "--methods", "zeroshot", "cocoop"]
    call += ["-o", str(tmp_path), "-q", *SHORT]
    assert cli.run(call) == 0
    out, err = capsys.readouterr()
    assert err == ""
    results = json.loads((tmp_path / "results.json").read_text())
    for entry in results["table"]:
        deviation = "" if entry["std"] is None else f"±{entry['std']:.2f}"
        assert (entry["std"] is None) == (entry["method"] == "zeroshot")  # which learns nothing from a seed
        assert f"{entry['mean']:.2f}{deviation}" in out
    assert [cell["status"] for cell in results["cells"]] == ["finished"] * 4
    assert {p.name for p in tmp_path.iterdir()} == {
        "digits",
        "features",
        "results.json",
        "table.csv",
        "table.md",
        "table.tex",
    }
    assert cli.run([*call, "--json"]) == 0
    again = result(capsys)
    assert again["command"] == "run" and again["table"] == results["table"]


def test_without_arguments_the_digits_are_run_as_the_paper_s_table(tmp_path, capsys, tiny):
    assert (
        cli.run(["run", "base2new", "-q", "--json", "-o", str(tmp_path), "--shots", "1", "optim.epochs", "1"])
        == 0
    )
    found = result(capsys)
    assert (found["datasets"], found["methods"], found["seeds"]) == (
        ["digits"],
        ["zeroshot", "coop", "cocoop"],
        [1, 2, 3],
    )


def test_folders_of_one_s_own(tmp_path, capsys, tiny):
    folders(tmp_path, "pets", "cars")
    call = [
        "run",
        "cross-dataset",
        "--source",
        f"pets={tmp_path / 'pets'}",
        "--methods",
        "zeroshot",
        "--seeds",
        "5",
    ]
    call += [
        "--datasets",
        f"cars={tmp_path / 'cars'}",
        "digits",
        "-o",
        str(tmp_path / "out"),
        "-q",
        "--json",
        *SHORT,
    ]
    assert cli.run(call) == 0
    found = result(capsys)
    assert (found["source"], found["datasets"]) == ("pets", ["cars", "digits"])
    assert [entry["dataset"] for entry in found["table"]] == ["pets", "cars", "digits", "average"]
    assert list(found["cells"][0]["accuracy"]) == ["pets", "cars", "digits"]


def test_failures_are_listed_at_the_end(tmp_path, capsys, monkeypatch, tiny):
    original = shared.build_model

    def broken(prompt, *rest, **options):
        if prompt.method == "coop":
            raise RuntimeError("no\nluck")
        return original(prompt, *rest, **options)

    monkeypatch.setattr(shared, "build_model", broken)
    call = [
        "run",
        "base2new",
        "--methods",
        "zeroshot",
        "coop",
        "--seeds",
        "1",
        "-q",
        "-o",
        str(tmp_path),
        *SHORT,
    ]
    assert cli.run(call) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "warning: digits, coop, seed 1 failed: RuntimeError: no luck",
        "error: 1 of 2 cells failed; the same command tries them again.",
    ]
    assert "zero-shot CLIP" in out and "1 of 2 cells are missing." in out
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [(cell["status"], cell["error"]) for cell in cells] == [
        ("finished", None),
        ("failed", "RuntimeError: no\nluck"),
    ]


def test_an_interruption_leaves_the_table_of_what_is_finished(tmp_path, capsys, monkeypatch, tiny):
    original = run_cell.run_cell

    def stop_at_the_second(cell, *rest, **options):
        if cell.seed == 2:
            raise KeyboardInterrupt
        return original(cell, *rest, **options)

    monkeypatch.setattr(run_cell, "run_cell", stop_at_the_second)
    call = ["run", "base2new", "--methods", "zeroshot", "-q", "-o", str(tmp_path), *SHORT]
    assert cli.run(call) == 130
    assert "interrupted" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["status"] for cell in results["cells"]] == ["finished", "pending", "pending"]
    assert [entry["seeds"].keys() for entry in results["table"]] == [{"1": 0}.keys()] * 3


def test_changed_settings_are_refused_and_redone(tmp_path, capsys, tiny):
    call = [
        "run",
        "base2new",
        "--methods",
        "cocoop",
        "--seeds",
        "1",
        "-q",
        "-o",
        str(tmp_path),
        "--shots",
        "2",
    ]
    assert cli.run([*call, "optim.epochs", "1"]) == 0
    capsys.readouterr()
    assert cli.run([*call, "optim.epochs", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(
        "error: 1 cell was trained with another configuration: digits, cocoop, seed 1"
    )
    assert "--redo-changed" in err and len(err.splitlines()) == 1
    assert cli.run([*call, "--redo-changed", "--json", "optim.epochs", "2"]) == 0
    assert result(capsys)["config"]["optim.epochs"] == 2
    assert cli.run([*call, "--overwrite", "optim.epochs", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (
            ["base2old"],
            2,
            "There is no protocol 'base2old'; did you mean base2new? The protocols are base2new, cross-dataset",
        ),
        (["base2new", "--datasets", "nowhere"], 2, "There is no data set called nowhere"),
        (["base2new", "--datasets", "digits,,x"], 2, "--datasets has an empty name"),
        (["base2new", "--datasets", "a=", "b"], 2, "'a=' is not NAME=PATH"),
        (["base2new", "--datasets", "../x=data"], 2, "is not NAME=PATH"),
        (["base2new", "--datasets", "a=one", "a=two"], 2, "a is named with two places"),
        (
            ["base2new", "--datasets", "a=/nonexistent"],
            1,
            "Not all data sets are there: a lacks /nonexistent",
        ),
        (["base2new", "--root", "/nonexistent"], 1, "Not all data sets are there: imagenet lacks"),
        (["base2new", "--methods", "magic"], 2, "there is no method 'magic'"),
        (["base2new", "--seeds", "one"], 2, "--seeds has 'one', but seeds are whole numbers"),
        (["base2new", "--source", "digits"], 2, "--source is not for base2new"),
        (["cross-dataset", "--all-classes", "--source", "digits"], 2, "--all-classes is for base2new"),
        (["cross-dataset", "--source", "digits", "--datasets", "digits"], 2, "names only digits, the source"),
        (["base2new", "data.subset", "all"], 2, "`data.subset` is decided cell by cell"),
        (["base2new", "data.name", "folder"], 2, "`data.name` is decided cell by cell"),
        (["base2new", "seed", "4"], 2, "`seed` is decided cell by cell"),
        (["base2new", "optim.epochs", "0"], 2, "`optim.epochs` is 0"),
        (["base2new", "--model", "ViT-X"], 2, "'ViT-X' is not an open_clip architecture"),
        (["base2new", "--device", "cuda:77"], 2, "'cuda:77' is not there"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_anything_is_written(
    tmp_path, capsys, monkeypatch, arguments, status, sentence
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["run", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and sentence in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["base2new", "--devices", "tpu"], "The device 'tpu' is unknown"),
        (["base2new", "--devices", "cuda:77"], "'cuda:77' is not there"),
        (["base2new", "--jobs", "0"], "--jobs is 0, but it must be at least 1."),
    ],
)
def test_sweep_s_own_mistakes(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["sweep", *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_dense_time_says_what_the_steps_would_have_taken(tmp_path, capsys, tiny, monkeypatch):
    call = ["run", "base2new", "--datasets", "digits", "--seeds", "1", "--dense-time", "--json", "-q", *SHORT]
    assert cli.run([*call, "-o", str(tmp_path / "a"), "--methods", "zeroshot", "cocoop"]) == 0
    found = result(capsys)["dense_time"]
    assert found["steps"] == 10 and 0 < found["seconds"]  # two images of five classes, one a step
    assert found["dense"] is None or 0 < found["engine"] < 60
    assert (found["dense"] is None) == bool(found["why"])

    with monkeypatch.context() as patched:  # the same run, had it been trained on a GPU
        patched.setattr(
            "cocoop_fast.protocols.dense_time.resolve_device", lambda name: torch.device("cuda", 0)
        )
        assert cli.run([*call, "-o", str(tmp_path / "a"), "--methods", "zeroshot", "cocoop"]) == 0
    found = result(capsys)["dense_time"]
    assert found["dense"] is found["engine"] is None and "trained on cuda:0" in found["why"]

    assert cli.run([*call[:-6], *SHORT, "-o", str(tmp_path / "b"), "--methods", "zeroshot"]) == 0
    out, err = capsys.readouterr()
    assert "no finished run of cocoop" in err and "would have taken" not in out
