"""Training steps on a GPU: recorded, ahead and read late, they compute what plain ones do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from comparison import assert_close
from PIL import Image
from tiny_runs import loaded_tiny_clip
from tiny_training import NAMES, Recorder, clip_model, make_batches

from cocoop_fast import UserError
from cocoop_fast.config import OptimConfig, PromptConfig
from cocoop_fast.engine.graphs import WARM_UP_STEPS, CudaGraphs, Recorded
from cocoop_fast.evaluation import recorded
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.methods import build_model
from cocoop_fast.training.features import ImageFeatures
from cocoop_fast.training.precision import LossScaler
from cocoop_fast.training.step import loss_and_gradients
from cocoop_fast.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda")
DTYPES = {"fp32": torch.float32, "amp": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = pytest.mark.parametrize("precision", list(DTYPES))


def gpu_model(precision="fp32", method="cocoop", device=GPU):
    torch.manual_seed(1)
    loaded = replace(loaded_tiny_clip(), model=clip_model(DTYPES[precision]).to(device), device=device)
    return build_model(PromptConfig(method=method), list(NAMES), loaded)


def scaler_of(precision):
    return LossScaler(GPU, enabled=precision in ("fp16", "amp"))


def plain_step(model, precision, scaler=None):
    scaler = scaler or scaler_of(precision)
    return loss_and_gradients(model, list(model.prompt_learner.parameters()), precision, scaler)


@PRECISIONS
@pytest.mark.parametrize("method", ["cocoop", "coop"])
def test_replays_equal_plain_steps(precision, method):
    """For inputs, parameters, batch sizes and loss scales that change under the graphs; also where gradients overflow."""
    model, scaler = gpu_model(precision, method), scaler_of(precision)
    plain = plain_step(model, precision, scaler)
    recorded = Recorded(plain, pytest.fail, CudaGraphs(GPU))
    parameters = list(model.prompt_learner.parameters())
    generator = torch.Generator(GPU).manual_seed(0)
    for number in range(4 * WARM_UP_STEPS):
        batch = 2 if number % 2 else 5
        features = torch.randn(batch, 64, generator=generator, device=GPU)
        label = torch.randint(3, (batch,), generator=generator, device=GPU)
        if scaler.enabled:
            scaler.current().fill_(2.0**16 if number % 4 == 3 else 4.0)
        expected, found = plain(features, label), recorded(features, label)
        pairs = zip((found.report, *found.gradients), (expected.report, *expected.gradients), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        finite = [bool(one.isfinite().all()) for one in expected.gradients]
        assert all(finite) or (scaler.enabled and number % 4 == 3)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator, device=GPU))


@PRECISIONS
def test_a_step_does_not_wait(precision):
    """torch itself watches: any operation that would synchronise is an error."""
    trainer = Trainer(gpu_model(precision), make_batches(40, 2), OptimConfig(epochs=1), precision=precision)
    step = plain_step(trainer.model, precision)
    features, label = torch.randn(2, 64, device=GPU), torch.tensor([0, 2], device=GPU)
    for _ in range(2):  # the first compiles kernels and computes constants of the class list
        result = step(features, label)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(features, label)
        for parameter, gradient in zip(
            trainer.model.prompt_learner.parameters(), result.gradients, strict=True
        ):
            parameter.grad = gradient
        trainer.scaler.current()
        trainer.scaler.step(trainer.optimizer, result.overflow)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@PRECISIONS
def test_training_with_graphs_is_training_without(precision):
    runs = {}
    for cuda_graph in (False, True):
        recorder = Recorder()
        trainer = Trainer(
            gpu_model(precision),
            make_batches(24, 2),
            OptimConfig(epochs=3, lr=0.01),
            precision=precision,
            cuda_graph=cuda_graph,
            observer=recorder,
        )
        trainer.fit()
        runs[cuda_graph] = (
            [step.loss for step in recorder.steps],
            [parameter.detach().clone() for parameter in trainer.model.prompt_learner.parameters()],
        )
    assert runs[True][0] == runs[False][0] and len(runs[True][0]) == 36
    for ours, theirs in zip(runs[True][1], runs[False][1], strict=True):
        assert ours.equal(theirs)


def test_training_agrees_with_the_cpu():
    optim, runs = OptimConfig(epochs=2, lr=0.01), []
    for device in (torch.device("cpu"), GPU):
        recorder = Recorder()
        Trainer(gpu_model(device=device), make_batches(24, 2), optim, observer=recorder).fit()
        runs.append(torch.tensor([step.loss for step in recorder.steps]))
    assert_close(runs[1], runs[0], 1e-3, "losses")


@PRECISIONS
def test_features_on_their_own_stream_have_the_same_bits(precision):
    model, batches = gpu_model(precision), make_batches(40, 2)
    features = {}
    for groups_ahead in (0, 2):
        source = ImageFeatures(model, batches, precision, GPU, groups_ahead=groups_ahead)
        features[groups_ahead] = [(one.features.clone(), one.label.clone()) for one in source.epoch(1)]
    for ours, theirs in zip(features[2], features[0], strict=True):
        assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])


def test_a_broken_loss_is_named_and_not_saved():
    trainer = Trainer(gpu_model(), make_batches(20, 2), OptimConfig(epochs=3))
    saved = []

    def save():
        saved.append(trainer.step)
        if trainer.step == 10:
            with torch.no_grad():
                trainer.model.prompt_learner.ctx[0, 0] = torch.nan

    images = trainer.batches.describe(next(iter(trainer.batches.epoch(2))).sample)
    with pytest.raises(UserError, match=rf"became nan at step 11 \(epoch 2\), on {images}; "):
        trainer.fit(save=save, save_every=4)
    assert saved == [4, 8, 10]


def test_predictions_replayed_equal_those_launched_anew(monkeypatch):
    """For two batch sizes, and parameters that change under the graphs."""
    monkeypatch.setattr(recorded, "WORTH_RECORDING", WARM_UP_STEPS)
    model, clip, graphs = gpu_model(), replace(loaded_tiny_clip(), device=GPU), CudaGraphs(GPU)
    recording, plain = (
        Predictor(model, clip, NAMES, 2, record=record, on_message=pytest.fail) for record in (graphs, None)
    )
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(9)]
    for _ in range(2 * WARM_UP_STEPS):
        assert recording.predict(images) == plain.predict(images)
        with torch.no_grad():
            model.prompt_learner.ctx.mul_(-1.5)
    assert len(recording._recorded._recorded._recordings) == 2
