"""reference_compat: the reference's defects, for whoever compares with numbers that have them; off unless asked for."""

from __future__ import annotations

import json
import math
import re

import pytest
from tiny_runs import StopAfter, tiny_config, use_tiny_clip

from cocoop_fast.config import OptimConfig, RunConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.experiments import experiment
from cocoop_fast.runs.recipe import resolve
from cocoop_fast.training.observer import Observer
from cocoop_fast.training.schedule import frozen_rate, learning_rate

RATES = [1e-5] + [0.001 * (1 + math.cos(math.pi * (epoch - 2) / 10)) for epoch in range(2, 11)]


class Rates(Observer):
    def __init__(self):
        self.rates = []

    def on_step(self, info):
        self.rates.append(info.lr)


def config_of(folder, **fields):
    """Ten epochs of one step."""
    return tiny_config(
        folder, data__shots=1, optim__epochs=10, optim__batch_size=5, reference_compat=True, **fields
    )


def test_the_rate_freezes_on_a_resume():
    """Measured on the reference: resumed at epoch 5, the rate stays 1.58779e-3 to the end."""
    optim = OptimConfig(epochs=10)
    assert [round(frozen_rate(optim, epoch, resumed_in=5), 8) for epoch in range(5, 11)] == [0.00158779] * 6
    assert frozen_rate(optim, 1, resumed_in=1) == 1e-5
    assert frozen_rate(optim, 7, resumed_in=1) == learning_rate(optim, 2)


def test_a_resumed_run(tmp_path, monkeypatch):
    use_tiny_clip(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config_of(tmp_path), observer=StopAfter(5))  # in epoch 5, of which nothing is kept
    rest = Rates()
    experiment.run(config_of(tmp_path), observer=rest)
    assert rest.rates == [pytest.approx(RATES[4], abs=1e-12, rel=0)] * 6


def test_an_uninterrupted_run(tmp_path, monkeypatch):
    """Trains as ever in fp32; its log shows the rate of the next epoch, its results have one decimal."""
    use_tiny_clip(monkeypatch)
    rates = Rates()
    results = experiment.run(config_of(tmp_path, print_freq=1), observer=rates)
    assert rates.rates == pytest.approx(RATES, abs=1e-12, rel=0)
    printed = re.findall(r" lr (\S+) eta ", (tmp_path / "log.txt").read_text())
    assert printed == [f"{learning_rate(OptimConfig(epochs=10), epoch):.4e}" for epoch in range(2, 12)]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["lr"] for record in records if record["event"] == "step"] == rates.rates
    [row] = results.rows
    exact = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert row.base == round(row.base, 1) == round(exact["base"]["accuracy"], 1)
    assert row.h == pytest.approx(2 * row.base * row.new / (row.base + row.new))


def test_it_learns_in_the_models_precision_and_only_if_asked():
    data = load_dataset(RunConfig().data)
    compat, own = (resolve(RunConfig(reference_compat=asked), data) for asked in (True, False))
    assert not compat.optim.master_weights and own.optim.master_weights
