"""The commands from end to end: what they print where, and that a run can be evaluated and used."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from cocoop_fast import cli
from cocoop_fast.cli import failures
from cocoop_fast.cli.progress import Bars, Lines, observe
from cocoop_fast.config import DataConfig
from cocoop_fast.data.registry import REGISTRY
from cocoop_fast.errors import UserError
from cocoop_fast.training.observer import Observer

SHORT = ["--epochs", "2", "--shots", "1"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], str]:
    """A short run on the embedded data, compared with zero-shot CLIP: its directory, JSON and stderr."""
    folder = tmp_path_factory.mktemp("cli")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(["train", *SHORT, "--compare", "zeroshot", "-o", str(folder / "run"), "--json"])
    assert status == 0, err.getvalue()
    (line,) = out.getvalue().splitlines()
    return folder / "run", json.loads(line), err.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """One test image of each digit, by class name."""
    dataset = REGISTRY["digits"].load(DataConfig())
    paths = {}
    for sample in dataset.test:
        if sample.classname not in paths:
            paths[sample.classname] = tmp_path / f"{sample.classname}.png"
            dataset.read(sample).save(paths[sample.classname])
    return paths


# -- train ------------------------------------------------------------------------------------------------------


def test_json_is_one_line_and_complete(digits):
    run_dir, result, _ = digits
    assert result["command"] == "train"
    assert result["output_dir"] == str(run_dir)
    assert [row["method"] for row in result["rows"]] == ["cocoop", "zeroshot"]
    for row in result["rows"]:
        assert row["seed"] == 1
        assert row["h"] == pytest.approx(2 * row["base"] * row["new"] / (row["base"] + row["new"]))


def test_progress_away_from_a_terminal_is_a_plain_line_an_epoch(digits):
    _, _, err = digits
    assert "\x1b" not in err and "\r" not in err
    assert len([line for line in err.splitlines() if line.startswith("cocoop: epoch ")]) == 2


def test_the_table_of_a_finished_run(digits, capsys):
    run_dir, result, _ = digits
    # A finished run is read, not trained again: the same command prints its table.
    assert cli.run(["train", *SHORT, "--compare", "zeroshot", "-o", str(run_dir), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[0] == ["Method", "Base", "New", "H", "Seed", "Trained", "in"]
    rows = {"CoCoOp": result["rows"][0], "zero-shot CLIP": result["rows"][1]}
    for title, row in rows.items():
        line = next(line for line in out.splitlines() if line.strip().startswith(title))
        assert f"{row['base']:.2f}" in line and f"{row['new']:.2f}" in line and f"{row['h']:.2f}" in line
    assert f"Run directory: {run_dir}" in out


def test_other_classes_have_no_harmonic_mean(tmp_path, capsys):
    assert cli.run(["train", "-m", "zeroshot", "--subset", "all", "-q", "-o", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.split()[:3] == ["Method", "All", "Seed"]


def test_files_options_and_pairs_reach_the_run(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("TRAINER: {COOP: {N_CTX: 3}}\nOPTIM: {MAX_EPOCH: 9, LR: 0.1}\n")
    run_dir = tmp_path / "run"
    call = ["train", "-c", str(config), "--shots", "1", "--lr", "0.2", "-q", "-o", str(run_dir)]
    assert cli.run([*call, "--subset", "base", "optim.epochs", "1", "OPTIM.MOMENTUM", "0.5"]) == 0
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert written["prompt"]["method"] == "coop"
    assert (written["prompt"]["n_ctx"], written["prompt"]["ctx_init"]) == (3, "")
    assert (written["optim"]["epochs"], written["optim"]["lr"], written["optim"]["momentum"]) == (1, 0.2, 0.5)
    assert "CoOp" in capsys.readouterr().out
    second = (run_dir / "log.txt").read_text().splitlines()[1]
    assert second == (
        "coop; context of 3 random vectors; base classes of digits; 1 images a class; demo; "
        "1 epochs in batches of 32 from lr 0.2"
    )


def test_warnings_go_to_stderr(tmp_path, capsys):
    call = ["train", "-m", "zeroshot", "-q", "-o", str(tmp_path / "run"), "--json", "VERBOSE", "True"]
    assert cli.run(call) == 0
    out, err = capsys.readouterr()
    first, second, *others = err.splitlines()
    assert not others or torch.cuda.is_available()  # where torch may have a word to say of the machine
    assert first == "warning: the command line: VERBOSE is ignored; it does not change what is learned."
    assert second.startswith("warning: Not said, and so as in the reference: DATASET.SUBSAMPLE_CLASSES all")
    assert len(out.splitlines()) == 1 and json.loads(out)["rows"][0]["method"] == "zeroshot"


def test_overwrite_begins_anew(digits, tmp_path, capsys):
    call = ["train", "-m", "zeroshot", "-q", "-o", str(tmp_path / "run")]
    assert cli.run(call) == 0
    assert cli.run([*call, "--seed", "2"]) == failures.WRONG_USAGE
    assert "another configuration" in capsys.readouterr().err
    assert cli.run([*call, "--seed", "2", "--overwrite"]) == 0


# -- eval, predict, datasets ------------------------------------------------------------------------------------


def test_a_warning_is_said_once(monkeypatch, capsys):
    def warn_twice(**options):
        warnings.warn("8 workers are too many", stacklevel=1)
        warnings.warn("8 workers are too many", stacklevel=1)  # elsewhere, which to Python is another one
        return 0

    monkeypatch.setattr(cli, "app", warn_twice)
    assert cli.run([]) == 0
    assert capsys.readouterr().err == "warning: 8 workers are too many\n"


def test_eval_repeats_the_runs_result(digits, capsys):
    run_dir, result, _ = digits
    assert cli.run(["eval", str(run_dir), "--json", "-q"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    evaluated = json.loads(line)
    for subset in ("base", "new"):
        assert evaluated["results"][subset]["accuracy"] == pytest.approx(result["rows"][0][subset])
    assert evaluated["h"] == pytest.approx(result["rows"][0]["h"])


def test_eval_of_a_checkpoint_of_the_reference_without_a_run(digits, tmp_path, capsys):
    run_dir, result, _ = digits
    file = tmp_path / "prompt_learner"  # as somebody else has it, without our files
    shutil.copytree(run_dir / "prompt_learner", file)
    call = [
        "eval",
        "--reference-checkpoint",
        str(file),
        "--dataset",
        "digits",
        "--model",
        "demo",
        "--json",
        "-q",
    ]
    assert cli.run(call) == 0
    (line,) = capsys.readouterr().out.splitlines()
    evaluated = json.loads(line)
    assert evaluated["run_dir"] is None and set(evaluated["results"]) == {"base", "new"}
    for subset in ("base", "new"):
        assert evaluated["results"][subset]["accuracy"] == pytest.approx(result["rows"][0][subset])
    assert cli.run(["eval", str(run_dir), "--model", "demo"]) == failures.WRONG_USAGE
    assert "says its model and data itself; leave out --model" in capsys.readouterr().err


def test_eval_by_shortlist_says_how_far_it_is_from_exact(digits, capsys):
    run_dir, result, _ = digits
    before = json.loads((run_dir / "results.json").read_text())
    assert cli.run(["eval", str(run_dir), "--subset", "new", "--shortlist", "2", "-q"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "new: not exact, each image chose among 2 classes. All classes, on 1" in out
    assert re.search(r"the same answer for \d+ \(\d+\.\d\d %\); accuracy .* \(95 % interval -", out)
    assert cli.run(["eval", str(run_dir), "--subset", "base", "--shortlist", "5", "--json", "-q"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["results"]
    assert evaluated["base"]["shortlist"]["agreement"] == 100
    noted = json.loads((run_dir / "results.json").read_text())
    assert noted.pop("shortlists")["base"]["shortlist"] == evaluated["base"]["shortlist"]
    assert noted == before and evaluated["base"]["accuracy"] == pytest.approx(result["rows"][0]["base"])


def test_eval_of_one_subset_as_a_table(digits, capsys):
    run_dir, result, _ = digits
    assert cli.run(["eval", str(run_dir), "--subset", "new", "-q"]) == 0
    out = capsys.readouterr().out
    assert out.split()[:6] == ["Classes", "Images", "Correct", "Accuracy", "Macro", "F1"]
    assert f"{result['rows'][0]['new']:.2f}" in out and "base" not in out and "H," not in out


def test_predict_by_a_run(digits, pictures, capsys):
    picture = str(pictures["digit zero"])
    assert cli.run(["predict", picture, "--run", str(digits[0]), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (prediction,) = json.loads(line)["predictions"]
    assert prediction["image"] == picture
    names = [entry["name"] for entry in prediction["classes"]]
    chances = [entry["probability"] for entry in prediction["classes"]]
    assert set(names) == {f"digit {word}" for word in ("zero", "one", "two", "three", "four")}
    assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1, abs=1e-5)


def test_predict_without_a_run_is_zero_shot(pictures, capsys):
    assert cli.run(["predict", *map(str, pictures.values()), "--top-k", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run_dir"] is None
    found = [entry["name"] for prediction in result["predictions"] for entry in prediction["classes"]]
    assert sum(map(str.__eq__, found, pictures)) >= 7  # of ten: the embedded CLIP knows its digits


def test_predict_among_classes_of_ones_own(digits, pictures, capsys):
    classes = ["--classes", "digit two,digit seven", "--classes", "letter a"]
    call = ["predict", str(pictures["digit two"]), "--run", str(digits[0]), "-k", "2"]
    assert cli.run([*call, *classes]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("%")]
    assert len(rows) == 2


def test_predict_takes_folders_and_names_what_it_cannot_read(tmp_path, pictures, capsys):
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    for name in ("2.png", "1.png"):
        shutil.copy(pictures["digit two"], folder / name)
    (folder / "bad.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left out")
    call = ["predict", str(tmp_path / "deep"), str(pictures["digit one"]), "--top-k", "1"]
    assert cli.run([*call, "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    images = [str(folder / "1.png"), str(folder / "2.png"), str(pictures["digit one"])]
    assert [one["image"] for one in result["predictions"]] == images
    assert all(len(one["classes"]) == 1 for one in result["predictions"])
    assert result["unreadable"] == [{"image": str(folder / "bad.jpg"), "fault": "not an image"}]
    model, fault = err.splitlines()
    assert model == "Model: demo, an embedded CLIP, which knows digits and letters alone"
    assert fault == f"error: 1 of 4 images cannot be read: {folder / 'bad.jpg'} (not an image)."
    assert cli.run(call) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("%")]
    assert len(rows) == 3


@pytest.mark.parametrize("mark", ["", "@"])
def test_classes_may_come_from_a_file_in_every_command(tmp_path, pictures, capsys, mark):
    names = tmp_path / "names.txt"
    names.write_text("digit two\n\nsorrel, horse\n")
    call = ["predict", str(pictures["digit two"]), "--classes", f"{mark}{names}", "--json"]
    assert cli.run(call) == 0
    [prediction] = json.loads(capsys.readouterr().out)["predictions"]
    assert {one["name"] for one in prediction["classes"]} == {"digit two", "sorrel, horse"}


def test_datasets_says_what_is_missing(tmp_path, capsys):
    assert cli.run(["datasets", "--root", str(tmp_path / "nowhere"), "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["datasets"]}
    assert found.keys() == REGISTRY.keys()
    assert found["digits"]["missing"] == []
    assert found["folder"]["missing"] == [str(tmp_path / "nowhere")]

    assert cli.run(["datasets"]) == 0
    out = capsys.readouterr().out
    assert "digits" in out and "folder" in out


# -- help and the outside of the process ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "eval", "predict", "datasets"])
def test_help_has_an_example(command, capsys):
    assert cli.run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"cocoop-fast {command} " in out and "Example" in out


def test_help_names_every_command(capsys):
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    words = ("train", "eval", "predict", "datasets", "--version", "Exit status")
    assert [word for word in words if word not in out] == []


def test_no_command_is_wrong_usage(capsys):
    assert cli.run([]) == failures.WRONG_USAGE
    assert "Usage: cocoop-fast" in capsys.readouterr().out


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cocoop-fast ")


def test_a_reader_that_goes_away_is_told_nothing():
    # A pipe whose reading end is closed before anything is written to it.
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        command = [sys.executable, "-m", "cocoop_fast", "datasets"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == failures.FAILED


@pytest.mark.parametrize(
    ("error", "says", "status"),
    [
        (UserError("The cat is missing.", exit_status=1), "The cat is missing.", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (FileNotFoundError(2, "No such file", "a.txt"), "a.txt: No such file or directory.", 1),
        (OSError(28, "No space left on device"), "free some space", 1),
        (MemoryError(), "the memory is used up", 1),
        (ZeroDivisionError("division by zero"), "unexpected ZeroDivisionError: division by zero", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_exception_becomes_a_sentence(error, says, status):
    sentence, found = failures.explain(error)
    assert says in sentence and sentence.endswith(".") and found == status


def test_a_sentence_of_several_lines_becomes_one(capsys):
    assert cli.run(["train", "--method", "two\n lines"]) == failures.WRONG_USAGE
    assert cli.run(["eval", "two\n  lines"]) == failures.WRONG_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("error: --method: `prompt.method` is 'two\\n lines'")
    assert second.startswith("error: two lines is not a run directory")


def test_a_run_that_is_interrupted_early_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("cocoop_fast.experiments.shared.build_model", interrupted)
    assert cli.run(["train", "-q", "-o", str(tmp_path / "a" / "b")]) == failures.INTERRUPTED
    assert list(tmp_path.iterdir()) == []


# -- progress ---------------------------------------------------------------------------------------------------


def test_the_stream_decides_how_progress_looks():
    with observe(stream=io.StringIO()) as observer:
        assert isinstance(observer, Lines)
    with observe(stream=Terminal()) as observer:
        assert isinstance(observer, Bars)
    with observe(quiet=True, stream=Terminal()) as observer:
        assert type(observer) is Observer


def test_bars_show_epoch_loss_accuracy_rate_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    call = f"train -m coop --shots 4 --epochs 12 -b 4 -o {tmp_path}"
    with contextlib.redirect_stderr(Terminal()) as terminal:
        assert cli.run(call.split()) == 0
    shown = terminal.getvalue()
    parts = ("coop epoch 12/12", "loss ", "acc ", "images/s", "ETA 0:", "coop, base classes", "accuracy ")
    assert [part for part in parts if part not in shown] == []


def test_long_runs_print_few_plain_lines(tmp_path, capsys):
    assert cli.run(f"train -m coop --shots 1 --epochs 25 -b 5 -o {tmp_path}".split()) == 0
    epochs = [line for line in capsys.readouterr().err.splitlines() if ": epoch " in line]
    assert len(epochs) <= 10
    assert "epoch 25/25" in epochs[-1]


def test_a_bad_picture_can_be_left_out(tmp_path, capsys):
    for label, name in enumerate(("one", "two", "three", "four")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (32, 32), (40 * i, 90, label)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "one" / "0.png").write_text("no picture")
    call = ["train", "-m", "zeroshot", "--root", str(tmp_path / "photos"), "-o", str(tmp_path / "run")]
    call += ["data.shots", "0"]
    assert cli.run(call) == failures.FAILED
    assert "one/0.png (not an image)" in capsys.readouterr().err
    assert cli.run([*call, "--skip-bad-images"]) == 0
    assert "Left out 1 of" in capsys.readouterr().err
