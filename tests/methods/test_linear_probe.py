"""The linear probe: its search for C, its classifier, and whole runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny_models import tiny_clip
from tiny_runs import tiny_config, use_tiny_clip

from cocoop_fast import UserError
from cocoop_fast.experiments import experiment
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.methods import LinearProbe
from cocoop_fast.runs.checkpoint import load_newest


def images(classes, count, seed, noise=1.5):
    """(classes * count, 64) features around a random centre for each class, and labels."""
    centres = torch.randn(classes, 64, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(count)
    return centres[label] + noise * torch.randn(len(label), 64, generator=generator), label


def published_search(x, y, val_x, val_y):
    """The published algorithm, step by step, with C on its logarithmic scale."""

    def accuracy(c):
        return (LogisticRegression(C=c, max_iter=1000).fit(x, y).predict(val_x) == val_y).mean()

    scores = [accuracy(10.0**p) for p in (6, 4, 2, 0, -2, -4, -6)]
    peak = (6, 4, 2, 0, -2, -4, -6)[int(np.argmax(scores))]
    low, high = peak - 1.0, peak + 1.0
    for _ in range(8):
        if accuracy(10**low) < accuracy(10**high):
            final, low = high, (low + high) / 2
        else:
            final, high = low, (low + high) / 2
    return final


@pytest.mark.filterwarnings("ignore:lbfgs failed")
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_is_the_published_one(classes, seed):
    (x, y), (val_x, val_y) = images(classes, 4, seed), images(classes, 8, seed + 100, noise=4.0)
    probe = LinearProbe(["name"] * classes, tiny_clip())
    fit = probe.fit(x, y, val_x, val_y)
    arrays = (one.double().numpy() for one in (x, val_x))
    expected = published_search(next(arrays), y.numpy(), next(arrays), val_y.numpy())
    assert math.isclose(math.log10(fit.strength), expected, abs_tol=1e-9)
    classifier = LogisticRegression(C=10**expected, max_iter=1000).fit(x.double().numpy(), y.numpy())
    probabilities = probe.eval().forward_features(val_x).softmax(dim=1)
    torch.testing.assert_close(
        probabilities.double(),
        torch.from_numpy(classifier.predict_proba(val_x.double().numpy())),
        atol=1e-5,
        rtol=0,
    )
    assert fit.accuracy == 100 * (probabilities.argmax(dim=1) == val_y).double().mean().item()


def test_without_validation_images_c_is_clips_own():
    x, y = images(3, 4, 0)
    fit = LinearProbe(["a", "b", "c"], tiny_clip()).fit(x, y)
    assert (fit.strength, fit.accuracy) == (0.316, None)


def test_what_cannot_be_fitted_is_refused():
    x, y = images(3, 2, 0)
    with pytest.raises(UserError, match="two or more classes, but class 3 has none"):
        LinearProbe(["a", "b", "c", "d"], tiny_clip()).fit(x, y)
    with pytest.raises(UserError, match="but there is one class"):
        LinearProbe(["a"], tiny_clip()).fit(x[:2], y[:2])
    with pytest.raises(UserError, match="knows the 3 classes that it was fitted on, not 2"):
        LinearProbe(["a", "b", "c"], tiny_clip()).set_classnames(["a", "b"])


def test_a_run(tmp_path, monkeypatch):
    use_tiny_clip(monkeypatch)
    config = tiny_config(tmp_path / "run", prompt__method="linear-probe")
    messages = []

    class Listener(experiment.Observer):
        def on_message(self, message):
            messages.append(message)

    (row,) = experiment.run(config, observer=Listener()).rows
    assert row.base is not None and (row.new, row.h, row.all) == (None, None, None)
    assert row.base > 100 / 5, "no better than chance"
    (told,) = [message for message in messages if message.startswith("Linear probe: C = ")]
    assert "of 10 validation images" in told  # two for each of the five classes, as the shots
    assert set(load_newest(tmp_path / "run" / "checkpoints").parameters) == {"weight", "bias"}
    assert not (tmp_path / "run" / "prompt_learner").exists()
    assert experiment.evaluate_run(tmp_path / "run")["base"].accuracy == row.base
    with pytest.raises(
        UserError,
        match="5 classes that it was trained on, so it cannot be evaluated on new classes of digits",
    ):
        experiment.evaluate_run(tmp_path / "run", subset="new")
    assert len(Predictor.from_run(tmp_path / "run").classnames) == 5


def test_contexts_of_single_classes_are_tested_on_them_alone(tmp_path, monkeypatch):
    use_tiny_clip(monkeypatch)
    config = tiny_config(
        tmp_path / "run",
        prompt__method="coop",
        prompt__csc=True,
        prompt__ctx_init="",
        prompt__class_position="front",
    )
    (row,) = experiment.run(config).rows
    assert row.base is not None and row.new is None
    with pytest.raises(UserError, match="cannot be evaluated on all classes of digits"):
        experiment.evaluate_run(tmp_path / "run", subset="all")
