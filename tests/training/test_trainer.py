"""The loop: the same trajectory as dense CoCoOp, bit-exact resuming, precisions, and a loss that breaks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from comparison import assert_close
from open_clip.model import CLIP
from PIL import Image
from tiny_models import tiny_clip
from tiny_runs import StopAfter, loaded_tiny_clip
from torch import nn

from cocoop_fast import UserError
from cocoop_fast.config import Method, OptimConfig, PromptConfig
from cocoop_fast.data import Dataset, Sample
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.data.transforms import Normalize, TrainTransform
from cocoop_fast.methods import build_model
from cocoop_fast.reference import DensePromptedCLIP
from cocoop_fast.training.observer import Observer
from cocoop_fast.training.trainer import Position, Trainer

COLOURS = {"red": (220, 30, 30), "dark green": (20, 110, 20), "sky blue": (110, 180, 250)}
NAMES = tuple(COLOURS)


def paint(sample: Sample) -> Image.Image:
    """A patch of the class's colour, with a gradient that makes crops differ."""
    ramp = np.linspace(0.6, 1.0, 16)[:, None, None] * np.linspace(0.8, 1.0, 20)[None, :, None]
    return Image.fromarray(
        (ramp * np.array(COLOURS[sample.classname]) * (1 - sample.source / 400)).astype(np.uint8)
    )


def make_batches(images: int, batch_size: int) -> TrainBatches:
    """``images`` in all, classes in turn: easy enough for a random CLIP to learn from."""
    samples = tuple(Sample(i, i % 3, NAMES[i % 3]) for i in range(images))
    data = Dataset("colours", NAMES, samples, (), samples, paint, where="memory")
    transform = TrainTransform(32, (0.5, 1.0), 0.5, Normalize((0.5,) * 3, (0.5,) * 3))
    return TrainBatches(data, samples, transform, batch_size, seed=1)


def clip_model(dtype: torch.dtype = torch.float32) -> CLIP:
    model = tiny_clip(layers=2, dtype=dtype)
    model.logit_scale.data.fill_(4.6)  # CLIP's own: exp(4.6) = 100
    return model


def fast_model(method: Method = "cocoop", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    clip = replace(loaded_tiny_clip(), model=clip_model(dtype), precision=precision)
    return build_model(PromptConfig(method=method), list(NAMES), clip)


class Recorder(Observer):
    def __init__(self):
        self.steps, self.epochs, self.calls = [], [], []

    def on_epoch_start(self, epoch, epochs, first_batch, batches):
        self.calls.append((epoch, epochs, first_batch, batches))

    def on_step(self, info):
        self.steps.append(info)

    def on_epoch_end(self, info):
        self.epochs.append(info)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize(("method", "batch_size"), [("cocoop", 1), ("coop", 2)])
def test_trajectory_is_that_of_the_dense_model(method, batch_size, dtype, tolerance):
    """Over 200 steps, warm-up, momentum and weight decay included, from one initial state."""
    images = 20 * batch_size
    optim = OptimConfig(epochs=10, lr=0.01)
    fast = fast_model(method, dtype)
    dense = DensePromptedCLIP(clip_model(dtype), NAMES, conditional=method == "cocoop")
    start = {name: value.clone() for name, value in fast.prompt_learner.named_parameters()}
    dense.prompt_learner.load_state_dict(start)
    losses = []
    for model in (fast, dense):
        recorder = Recorder()
        trainer = Trainer(model, make_batches(images, batch_size), optim, observer=recorder)
        trainer.fit()
        assert trainer.step >= 200
        losses.append(torch.tensor([step.loss for step in recorder.steps], dtype=torch.float64))
    assert_close(losses[0], losses[1], tolerance, "losses")
    assert losses[0][-30:].mean() < 0.8 * losses[0][:30].mean()  # something was learned
    expected = dict(dense.prompt_learner.named_parameters())
    for name, parameter in fast.prompt_learner.named_parameters():
        assert (parameter - start[name]).abs().max() > 1e-4, f"{name} did not move"
        assert_close(parameter, expected[name], tolerance, name)


def state(trainer):
    return [*trainer.model.prompt_learner.parameters()] + [
        value["momentum_buffer"] for value in trainer.optimizer.state_dict()["state"].values()
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("stop", [1, 9, 10, 17])
def test_resuming_is_exact(batch_size, stop):
    """Stopped after any step, in an epoch or at its end, and continued in a new trainer."""
    images = 10 * batch_size  # ten batches an epoch
    optim = OptimConfig(epochs=2, lr=0.01)
    whole = Trainer(fast_model(), make_batches(images, batch_size), optim)
    assert len(whole.batches) == 10
    whole.fit()
    first = Trainer(fast_model(), make_batches(images, batch_size), optim, observer=StopAfter(stop))
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert first.step == stop
    second = Trainer(fast_model(), make_batches(images, batch_size), optim)
    second.model.prompt_learner.load_state_dict(first.model.prompt_learner.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.position, second.seconds = first.position, first.seconds
    second.fit()
    assert second.seconds > first.seconds
    assert whole.position == second.position == Position(3, 0)
    for ours, theirs in zip(state(second), state(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_saving_moments():
    trainer = Trainer(fast_model(), make_batches(10, 1), OptimConfig(epochs=2))
    positions = []
    trainer.fit(save=lambda: positions.append(trainer.position), save_every=4)
    assert positions == [(1, 4), (1, 8), (2, 0), (2, 2), (2, 6), (3, 0)]  # the end of an epoch once


def test_what_the_observer_hears():
    recorder = Recorder()
    Trainer(fast_model(), make_batches(30, 3), OptimConfig(epochs=3, lr=0.01), observer=recorder).fit()
    assert recorder.calls == [(1, 3, 0, 10), (2, 3, 0, 10), (3, 3, 0, 10)]
    assert [step.step for step in recorder.steps] == list(range(1, 31))
    assert [step.lr for step in recorder.steps[::10]] == [1e-5, 0.01, pytest.approx(0.0075)]
    second = recorder.steps[10:20]
    assert recorder.epochs[1].loss == pytest.approx(sum(step.loss for step in second) / 10)
    assert recorder.epochs[1].accuracy == pytest.approx(sum(step.accuracy for step in second) / 10)
    assert all(step.seconds >= step.data_seconds >= 0 and step.eta_seconds >= 0 for step in recorder.steps)
    assert recorder.steps[-1].eta_seconds == 0


def test_only_the_prompt_learner_changes():
    model = fast_model()
    before = {name: value.clone() for name, value in model.image_encoder.state_dict().items()}
    Trainer(model, make_batches(10, 1), OptimConfig(epochs=1)).fit()
    assert model.prompt_learner.training and not model.image_encoder.training
    assert all(torch.equal(value, before[name]) for name, value in model.image_encoder.state_dict().items())


@pytest.mark.parametrize("precision", ["amp", "bf16"])
def test_low_precision_learns(precision):
    """On a CPU: bfloat16 autocast, or everything in bfloat16."""
    optim = OptimConfig(epochs=6, lr=0.02)
    runs = {}
    for name in ("fp32", precision):
        model = fast_model(dtype=torch.bfloat16 if name == "bf16" else torch.float32)
        recorder = Recorder()
        Trainer(model, make_batches(24, 2), optim, precision=name, observer=recorder).fit()
        runs[name] = recorder.epochs
    assert runs[precision][-1].loss < 0.9 * runs[precision][0].loss
    assert runs[precision][-1].loss == pytest.approx(runs["fp32"][-1].loss, rel=0.2)


def test_a_loss_that_is_not_finite_stops_the_run():
    model = fast_model()
    with torch.no_grad():
        model.prompt_learner.ctx[0, 0] = math.nan
    trainer = Trainer(model, make_batches(10, 1), OptimConfig(epochs=1))
    with pytest.raises(
        UserError, match=r"The loss became nan at step 1 \(epoch 1\), on \d+; try a lower"
    ) as error:
        trainer.fit()
    assert error.value.exit_status == 1 and trainer.step == 0
