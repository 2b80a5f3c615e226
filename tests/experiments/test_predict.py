"""Prediction: from files and from memory, over the run's classes or new ones."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_runs import tiny_config, use_tiny_clip, write_images

from cocoop_fast import UserError, cli
from cocoop_fast.evaluation.evaluate import test_transform
from cocoop_fast.experiments.experiment import run
from cocoop_fast.experiments.predict import Predictor


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        run(tiny_config(path, optim__lr=0.05))
    return path


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


def test_files_and_images_give_the_same(run_dir, tmp_path):
    paths = write_images(tmp_path, 3)
    predictor = Predictor.from_run(run_dir)
    assert predictor.classnames == ("digit zero", "digit one", "digit two", "digit three", "digit four")
    answers = predictor.predict([paths[0], str(paths[1]), Image.open(paths[2])], topk=5)
    assert answers == predictor.predict([Image.open(path) for path in paths], topk=5)
    for answer in answers:
        probabilities = [probability for _, probability in answer]
        assert sorted(probabilities, reverse=True) == probabilities
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert {name for name, _ in answer} == set(predictor.classnames)


def test_it_is_the_trained_model(run_dir, tmp_path):
    [path] = write_images(tmp_path, 1)
    predictor = Predictor.from_run(run_dir)
    view = test_transform(predictor.clip)(Image.open(path))[None]
    with torch.no_grad():
        expected = predictor.model(view).softmax(dim=1)[0]
    [answer] = predictor.predict([path])
    for name, probability in answer:
        assert probability == pytest.approx(float(expected[predictor.classnames.index(name)]), rel=1e-4)
    trained = torch.load(
        max((run_dir / "checkpoints").glob("*.pt")), weights_only=True
    )["parameters"]["ctx"]  # fmt: skip
    assert torch.equal(predictor.model.prompt_learner.ctx, trained)


def test_new_class_names(run_dir, tmp_path):
    [path] = write_images(tmp_path, 1)
    predictor = Predictor.from_run(run_dir, classnames=["red fox", "polar bear", "wolf"])
    [answer] = predictor.predict([path], topk=2)
    assert len(answer) == 2 and {name for name, _ in answer} < {"red fox", "polar bear", "wolf"}
    [answer] = predictor.predict([path], topk=50)
    assert len(answer) == 3
    assert predictor.predict([]) == []


def test_who_asks_a_base_run_hears_of_the_other_classes(run_dir, tmp_path, capsys):
    note = Predictor.from_run(run_dir).note
    assert note is not None
    assert "the 5 classes that the run was trained on" in note
    assert "5 more (digit five, digit six, digit seven, digit eight, digit nine), and --classes names" in note
    assert Predictor.from_run(run_dir, classnames=["red fox", "wolf"]).note is None

    [path] = write_images(tmp_path, 1)
    assert cli.run(["predict", str(path), "--run", str(run_dir), "--json"]) == 0
    assert note in capsys.readouterr().err
    run(tiny_config(tmp_path / "all", data__subset="all", optim__epochs=1))
    assert Predictor.from_run(tmp_path / "all").note is None


def test_more_images_than_a_batch(run_dir, tmp_path):
    paths = write_images(tmp_path, 5)
    whole = Predictor.from_run(run_dir)
    in_parts = Predictor(whole.model, whole.clip, whole.classnames, batch_size=2)
    for one, other in zip(in_parts.predict(paths), whole.predict(paths), strict=True):
        assert [name for name, _ in one] == [name for name, _ in other]


def test_bad_input(run_dir, tmp_path):
    predictor = Predictor.from_run(run_dir)
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x.png cannot be read: not an image"):
        predictor.predict([tmp_path / "x.png"])
    with pytest.raises(UserError, match=r"none.png cannot be read: missing"):
        predictor.predict([tmp_path / "none.png"])
    with pytest.raises(UserError, match=r"cannot be read: a directory"):
        predictor.predict([tmp_path])
    with pytest.raises(UserError, match=r"`topk` is 0"):
        predictor.predict([], topk=0)
    with pytest.raises(UserError, match=r"is not a run directory"):
        Predictor.from_run(tmp_path)
    with pytest.raises(UserError):
        Predictor.from_run(run_dir, classnames=[])
