"""What the program understood is told before it is used: the model, and the classes that a file names."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
from tiny_runs import At, loaded_tiny_clip, use_tiny_clip, write_images

from cocoop_fast import cli
from cocoop_fast.clip.load import describe
from cocoop_fast.config import ModelConfig, from_mapping
from cocoop_fast.experiments import shared as experiments
from cocoop_fast.experiments.experiment import evaluate_run, run
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.experiments.shared import Shared

REMEDY = "--model ViT-B/16"
DEMO = "Model: demo, an embedded CLIP, which knows digits and letters alone"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("n1", "n2", "n10"):
        write_images(tmp_path / "photos" / name, 4)
    return tmp_path / "photos"


def config(folder: Path, **data):
    return from_mapping(
        {
            "data": {"shots": 1, "subset": "all", **data},
            "optim": {"epochs": 1},
            "output_dir": str(folder),
        }
    )


def told(function, *args, **kwargs) -> tuple[list[str], list[str]]:
    """Messages and warnings, in their order."""
    listener = At(0, lambda: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs, observer=listener)
    return listener.messages, [str(one.message) for one in caught]


def test_a_model_in_a_line():
    assert describe(ModelConfig()) == DEMO
    assert describe(ModelConfig("ViT-B-16", "openai")) == "Model: ViT-B-16, weights openai"
    assert describe(ModelConfig("hf-hub:a/b")) == "Model: hf-hub:a/b, with its own weights"


def test_the_model_is_told_first_and_a_demo_for_ones_own_images_warned_of(tmp_path, photos):
    out = tmp_path / "run"
    messages, warned = told(run, config(out, name="folder", root=str(photos)), compare=("zeroshot",))
    assert messages[0] == DEMO and messages.count(DEMO) == 1
    assert len([text for text in warned if REMEDY in text]) == 1
    assert (out / "log.txt").read_text().splitlines()[0] == DEMO
    messages, warned = told(evaluate_run, out)
    assert messages[0] == DEMO and any(REMEDY in text for text in warned)
    said: list[str] = []
    with pytest.warns(UserWarning, match=REMEDY):
        Predictor.from_run(out, on_message=said.append)
    assert said == [DEMO]


def test_the_embedded_digits_need_no_warning(tmp_path):
    messages, warned = told(run, config(tmp_path / "run"))
    assert messages[0] == DEMO and not any(REMEDY in text for text in warned)


def test_predictions_without_a_run_tell_their_model(photos, capsys):
    image = str(photos / "n1" / "000.png")
    assert cli.run(["predict", image]) == 0
    assert capsys.readouterr().err.splitlines() == [DEMO]
    assert cli.run(["predict", image, "--classes", "cat,dog"]) == 0
    err = capsys.readouterr().err
    assert DEMO in err.splitlines() and REMEDY in err


def test_names_for_folders_reach_training_evaluation_and_prediction(tmp_path, photos):
    names = tmp_path / "names.txt"
    names.write_text("n1 tabby\nn2 red fox\nn10 wolf\n")
    asked = config(tmp_path / "run", name="folder", root=str(photos), class_names=str(names))
    shared = Shared()
    assert shared.dataset(asked.data).classnames == ("tabby", "red fox", "wolf")
    assert shared.test_set(asked.data).classnames == ("tabby", "red fox", "wolf")
    run(asked, shared=shared)
    assert Predictor.from_run(tmp_path / "run").classnames == ("tabby", "red fox", "wolf")


def test_the_log_says_what_was_assumed_and_how_the_data_were_understood(tmp_path, photos, monkeypatch):
    assumed = dataclasses.replace(loaded_tiny_clip(), assumed="GELU is assumed.")
    monkeypatch.setattr(experiments, "load_clip", lambda config: assumed)
    (photos / "n1" / "notes.txt").write_text("left out")
    run(config(tmp_path / "run", name="folder", root=str(photos)))
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert lines[0] == DEMO and lines[1].startswith("cocoop; context from") and lines[2].startswith("Classes")
    assert lines[3] == "GELU is assumed."
    assert lines[4].endswith("1 .txt.") and "look like numbers or ids" in lines[5]
