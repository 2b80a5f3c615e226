"""The average over epochs: against sums by hand, in a run, and through an interruption."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_runs import StopAfter, tiny_config, use_tiny_clip

from cocoop_fast.data import load_dataset
from cocoop_fast.experiments.experiment import run
from cocoop_fast.runs.checkpoint import load_newest
from cocoop_fast.runs.recipe import resolve
from cocoop_fast.training.average import GaussianAverage
from cocoop_fast.training.observer import Observer


def test_the_weighted_mean():
    parameters = [torch.zeros(2, 3), torch.zeros(4)]
    average = GaussianAverage(parameters, 4)  # its mean is epoch 3
    weights = [math.exp(-((e - 3) ** 2) / 2) for e in (1, 2, 3, 4)]
    assert average.weights == pytest.approx([w / sum(weights) for w in weights])
    values = [torch.full((2, 3), float(e)) for e in (1, 10, 100, 1000)]
    for epoch, value in enumerate(values, 1):
        parameters[0].copy_(value)
        average.add(epoch)
        if epoch < 4:
            assert (parameters[0] == value).all()
    expected = sum(w * v for w, v in zip(average.weights, values, strict=True))
    torch.testing.assert_close(parameters[0], expected)
    assert (parameters[1] == 0).all()


def test_the_recipes():
    def optim(**fields):
        config = tiny_config("out", **fields)
        return resolve(config, load_dataset(config.data)).optim

    near, kg, plain = optim(optim__consistency="l1"), optim(optim__consistency="cosine"), optim()
    assert (near.text_weight, near.logit_weight, near.average) == (25, 1, True)
    assert (kg.text_weight, kg.logit_weight, kg.average) == (8, 0, False)
    assert (plain.consistency, plain.average) == ("none", False)
    own = optim(optim__consistency="l1", optim__text_weight=0.0, optim__average=False)
    assert (own.text_weight, own.logit_weight, own.average) == (0, 1, False)


class Epochs(Observer):
    """What was learned when an epoch was over, before the average replaced it."""

    def __init__(self, folder):
        self.folder, self.learned = folder, []

    def on_checkpoint(self, path):
        self.learned.append(load_newest(self.folder).parameters)


def ctx(path):
    return load_newest(path / "checkpoints").parameters["ctx"]


def test_a_run_keeps_the_average_also_if_it_was_interrupted(tmp_path, monkeypatch):
    use_tiny_clip(monkeypatch)
    fields = {"optim__epochs": 3, "optim__consistency": "l1", "prompt__method": "cocoop"}
    epochs = Epochs(tmp_path / "whole" / "checkpoints")
    run(tiny_config(tmp_path / "whole", **fields), observer=epochs)
    run(tiny_config(tmp_path / "last", optim__average=False, **fields))
    ends = [one["ctx"] for one in epochs.learned[1:]]  # the first is that of the beginning
    assert len(ends) == 3
    weights = GaussianAverage([], 3).weights
    expected = weights[0] * ends[0] + weights[1] * ends[1] + weights[2] * ctx(tmp_path / "last")
    torch.testing.assert_close(ends[2], expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(ends[2], ctx(tmp_path / "last"))

    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(tmp_path / "stopped", **fields), observer=StopAfter(24))
    run(tiny_config(tmp_path / "stopped", **fields))
    assert torch.equal(ctx(tmp_path / "stopped"), ends[2])
