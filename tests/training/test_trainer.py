"""The loop: the same trajectory as dense CoCoOp, bit-exact resuming, precisions, and a loss that breaks."""

from __future__ import annotations

import math
import time

import pytest
import torch
from comparison import assert_close
from tiny_runs import StopAfter
from tiny_training import (
    NAMES,
    Recorder,
    broken,
    clip_model,
    fast_model,
    make_batches,
    recipe,
    replayed_by_running,
)

from cocoop_fast import UserError
from cocoop_fast.reference import DensePromptedCLIP
from cocoop_fast.training.features import ImageFeatures
from cocoop_fast.training.trainer import Launching, Position, Trainer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize(("method", "batch_size"), [("cocoop", 1), ("coop", 2)])
def test_trajectory_is_that_of_the_dense_model(method, batch_size, dtype, tolerance):
    """Over 200 steps, warm-up, momentum and weight decay included, from one initial state."""
    images = 20 * batch_size
    optim = recipe(epochs=10, lr=0.01)
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
    optim = recipe(epochs=2, lr=0.01)
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
    trainer = Trainer(fast_model(), make_batches(10, 1), recipe(epochs=2))
    positions = []
    trainer.fit(save=lambda: positions.append(trainer.position), save_every=4)
    assert positions == [(1, 4), (1, 8), (2, 0), (2, 2), (2, 6), (3, 0)]  # the end of an epoch once


def test_what_the_observer_hears():
    recorder = Recorder()
    Trainer(fast_model(), make_batches(30, 3), recipe(epochs=3, lr=0.01), observer=recorder).fit()
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
    Trainer(model, make_batches(10, 1), recipe(epochs=1)).fit()
    assert model.prompt_learner.training and not model.image_encoder.training
    assert all(torch.equal(value, before[name]) for name, value in model.image_encoder.state_dict().items())


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def train(precision="fp32", *, observer=None, **optim):
    """24 images in batches of two, for as many epochs as ``optim`` says."""
    model = fast_model(dtype=DTYPES.get(precision, torch.float32))
    trainer = Trainer(model, make_batches(24, 2), recipe(**optim), precision=precision, observer=observer)
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("precision", "master_weights"), [("amp", True), ("bf16", True), ("fp16", True), ("fp16", False)]
)
def test_low_precision_learns(precision, master_weights):
    """On a CPU: bfloat16 autocast, or the model in low precision. Without master weights, as the reference."""
    losses = {}
    for name in ("fp32", precision):
        recorder = Recorder()
        trainer = train(name, observer=recorder, epochs=6, lr=0.02, master_weights=master_weights)
        losses[name] = [epoch.loss for epoch in recorder.epochs]
    kept = {parameter.dtype for parameter in trainer.model.prompt_learner.parameters()}
    assert kept == {torch.float32 if master_weights else DTYPES[precision]}
    assert losses[precision][-1] < 0.9 * losses[precision][0]
    assert losses[precision][-1] == pytest.approx(losses["fp32"][-1], rel=0.2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_small_steps_are_not_lost_on_master_weights(precision):
    start = fast_model(dtype=DTYPES[precision]).prompt_learner.ctx.detach()
    moved = {}
    for master_weights in (True, False):
        trainer = train(precision, epochs=1, warmup_lr=1e-6, weight_decay=0.0, master_weights=master_weights)
        moved[master_weights] = (trainer.model.prompt_learner.ctx != start).float().mean()
    assert moved[True] > 0.95 and moved[False] < 0.5


def test_steps_that_overflow_are_skipped_counted_and_told():
    recorder = Recorder()
    trainer = train("fp16", observer=recorder, epochs=2, lr=0.02)
    state = trainer.scaler.state_dict()
    halvings = math.log2(2.0**16 / state["scale"])
    assert state["skipped"] == trainer.scaler.skipped == halvings
    assert recorder.epochs[-1].skipped_steps == halvings
    skips = [step.skipped_steps for step in recorder.steps]
    assert skips == sorted(skips) and skips[0] == 0 and skips[-1] <= halvings


def test_resuming_with_loss_scaling_is_exact():
    optim = recipe(epochs=2, lr=0.02)

    def new_trainer(observer=None):
        model = fast_model(dtype=torch.float16)
        trainer = Trainer(model, make_batches(24, 2), optim, precision="fp16", observer=observer)
        trainer.scaler.load_state_dict(  # a scale that overflows soon: the run has steps to skip
            {"scale": 2.0**40, "growth_factor": 2.0, "backoff_factor": 2.0**-9, "growth_interval": 4,
             "_growth_tracker": 0}
        )  # fmt: skip
        return trainer

    whole, first, second = new_trainer(), new_trainer(StopAfter(7)), new_trainer()
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    first.scaler.settle()
    second.model.prompt_learner.load_state_dict(first.model.prompt_learner.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scaler.load_state_dict(first.scaler.state_dict())
    second.position = first.position
    second.fit()
    assert whole.scaler.skipped >= 2
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    for ours, theirs in zip(state(second), state(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_not_finite_stops_the_run():
    model = fast_model()
    with torch.no_grad():
        model.prompt_learner.ctx[0, 0] = math.nan
    before = [p.detach().clone() for p in model.prompt_learner.meta_net.parameters()]
    trainer = Trainer(model, make_batches(10, 1), recipe(epochs=1))
    with pytest.raises(
        UserError, match=r"The loss became nan at step 1 \(epoch 1\), on \d+; try a lower"
    ) as error:
        trainer.fit()
    assert error.value.exit_status == 1 and trainer.step == 0
    after = model.prompt_learner.meta_net.parameters()
    assert all(ours.equal(theirs) for ours, theirs in zip(before, after, strict=True))


@pytest.mark.parametrize("lag", [0, 3, 5])
@pytest.mark.parametrize("save_every", [0, 1, 4])
def test_a_broken_loss_that_is_read_late_is_named_rightly_and_never_saved(save_every, lag):
    """Step 13 of 30, the third of the second epoch, breaks."""
    recorder, saved = Recorder(), []
    model = broken(fast_model(), {13}, value=math.inf)
    launching = Launching(under_way=lag)
    trainer = Trainer(model, make_batches(20, 2), recipe(epochs=3), observer=recorder, launching=launching)
    images = trainer.batches.describe(list(trainer.batches.epoch(2))[2].sample)
    with pytest.raises(UserError, match=rf"became inf at step 13 \(epoch 2\), on {images}; try a lower"):
        trainer.fit(save=lambda: saved.append(trainer.step), save_every=save_every)
    assert saved == {0: [10], 1: [*range(1, 13)], 4: [4, 8, 10, 12]}[save_every]
    assert [step.step for step in recorder.steps] == list(range(1, 13))
    assert trainer.step <= 12 + lag


def test_parameters_that_are_not_finite_are_not_saved():
    """What breaks after a step's loss was computed leaves no trace in it."""

    class Breaks(Recorder):
        def on_step(self, info):
            if info.step == 4:
                trainer.model.prompt_learner.ctx.data[0, 0] = math.nan

    trainer, saved = Trainer(fast_model(), make_batches(20, 2), recipe(epochs=3), observer=Breaks()), []
    with pytest.raises(UserError, match="parameters are not finite after step 4, although") as error:
        trainer.fit(save=lambda: saved.append(trainer.step), save_every=2)
    assert saved == [2] and error.value.exit_status == 1


@pytest.mark.parametrize(("method", "batch_size"), [("cocoop", 1), ("coop", 3)])
def test_recorded_steps_and_late_results_change_nothing(method, batch_size):
    optim, told = recipe(epochs=3, lr=0.01), {}
    runs = {}
    for launching in (Launching(), Launching(record=replayed_by_running, under_way=3)):
        recorder = Recorder()
        batches = make_batches(10 * batch_size, batch_size)
        trainer = Trainer(fast_model(method), batches, optim, observer=recorder, launching=launching)
        trainer.fit()
        assert recorder.messages == []  # all could be recorded
        runs[launching.under_way] = state(trainer)
        told[launching.under_way] = [
            [(s.step, s.epoch, s.batch, s.loss, s.accuracy, s.lr) for s in recorder.steps],
            [(e.epoch, e.loss, e.accuracy, e.lr) for e in recorder.epochs],
        ]
    assert told[3] == told[0]
    for ours, theirs in zip(runs[3], runs[0], strict=True):
        assert torch.equal(ours, theirs)


class Slow:
    """A disk that takes this long for each batch."""

    def __init__(self, source, seconds):
        self.source, self.seconds = source, seconds

    def epoch(self, epoch, first_batch=0):
        for one in self.source.epoch(epoch, first_batch):
            time.sleep(self.seconds)
            yield one


@pytest.mark.parametrize(("under_way", "seconds", "told"), [(2, 0.3, True), (2, 0.0, False), (0, 0.3, False)])
def test_a_gpu_that_waits_for_images_is_noticed_once(under_way, seconds, told):
    observer, model, batches = Recorder(), fast_model(), make_batches(6, 2)
    source = ImageFeatures(model, batches, "fp32", torch.device("cpu"), groups_ahead=0)
    optim, launching = recipe(epochs=2), Launching(under_way=under_way)
    Trainer(
        model, batches, optim, observer=observer, features=Slow(source, seconds), launching=launching
    ).fit()
    waits = [message for message in observer.messages if "waited for images" in message]
    assert len(waits) == told
    if told:
        assert "epoch 1" in waits[0] and "--workers, now 0" in waits[0]
