"""A step never waits for the device: proved on tensors without content, which nobody can read."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from tiny_runs import loaded_tiny_clip
from tiny_training import NAMES, Recorder, clip_model, make_batches, recipe, replayed_by_running
from torch.utils._python_dispatch import TorchDispatchMode

from cocoop_fast import ClassTree
from cocoop_fast.config import PromptConfig
from cocoop_fast.engine.torch_tower import TorchTower
from cocoop_fast.methods import build_model
from cocoop_fast.ops import head
from cocoop_fast.training.features import EncodedBatch
from cocoop_fast.training.optimizer import build_optimizer
from cocoop_fast.training.precision import LossScaler
from cocoop_fast.training.step import loss_and_gradients
from cocoop_fast.training.trainer import Launching, Trainer

META = torch.device("meta")


class NoReading(TorchDispatchMode):
    """Refuses the operations by which a host learns values, and so waits for a device."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "allclose")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.READS:
            raise AssertionError(f"the host reads a value: {func}")
        return func(*args, **(kwargs or {}))


def without_content(value):
    """A tensor, or what holds tensors, on the meta device; class trees stay, their tensors are on the CPU anyway."""
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if isinstance(value, tuple):
        return tuple(without_content(part) for part in value)
    if is_dataclass(value) and not isinstance(value, ClassTree):
        return replace(
            value, **{one.name: without_content(getattr(value, one.name)) for one in fields(value)}
        )
    return value


@pytest.mark.parametrize("method", ["cocoop", "coop"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_forward_and_backward_read_nothing(monkeypatch, method, dtype):
    """All of it, the checks of inputs, the loss scaling and the report included, on tensors without content."""
    clip = clip_model(dtype)
    loaded = replace(loaded_tiny_clip(), model=clip)
    model = build_model(PromptConfig(method=method), list(NAMES), loaded, backend="torch")
    features, label = torch.randn(2, 64), torch.tensor([0, 2])
    model.loss_and_logits(features, label)  # the first step computes constants of model and class list, once
    computed = model.tree_encoder.tower.constants
    constants = without_content(computed)
    constants.__dict__["node_qkv"] = without_content(computed.node_qkv)
    tower = TorchTower(constants)
    monkeypatch.setattr(type(model.tree_encoder), "tower", tower)
    monkeypatch.setattr(head, "select_backend", lambda *_: model.tree_encoder.backend)
    clip.to(META), model.to(META)
    parameters = list(model.prompt_learner.parameters())
    step = loss_and_gradients(model, parameters, "fp32", LossScaler(META, enabled=True))
    report, gradients, *_ = step(features.to(META), label.to(META))
    assert report.device == META and report.shape == (4,) and report.dtype == torch.float32
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.device == META and gradient.shape == parameter.shape
        assert parameter.dtype == gradient.dtype == torch.float32
    for reading in (report.tolist, report[0].item, report.cpu, report.isfinite().all().__bool__):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            reading()  # or the test would prove nothing


def scaled_run(*, fused):
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = build_optimizer([parameter], recipe(), fused=fused)
    scaler = LossScaler(torch.device("cpu"), enabled=True)
    (parameter.grad,) = torch.autograd.grad(scaler.current() * parameter.square().sum(), [parameter])
    return optimizer, scaler


def test_the_update_reads_nothing_even_to_skip_an_overflow():
    optimizer, scaler = scaled_run(fused=True)
    with NoReading():
        scaler.step(optimizer)
    optimizer, scaler = scaled_run(fused=True)
    with NoReading():
        scaler.step(optimizer, torch.tensor(1.0))
    assert scaler.current() == 2.0**15
    optimizer, scaler = scaled_run(fused=False)
    with pytest.raises(AssertionError, match="the host reads a value"), NoReading():
        scaler.step(optimizer)  # what the fused optimizer is for, and what the mode catches


def test_gradients_are_nobody_elses_memory():
    """One parameter's gradient would be an expanded scalar, and two others' the same tensor."""
    expanded, first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))

    class Sums(torch.nn.Module):
        def loss_and_logits(self, features, label):
            loss = expanded.sum() + (first + second).square().sum()
            return loss, features

    step = loss_and_gradients(
        Sums(), [expanded, first, second], "fp32", LossScaler(torch.device("cpu"), enabled=False)
    )
    gradients = step(torch.ones(1, 2), torch.tensor([0])).gradients
    for gradient in gradients:
        gradient.mul_(2)
    assert [gradient.tolist() for gradient in gradients] == [[2.0] * 3, [8.0] * 3, [8.0] * 3]


class Linear(torch.nn.Module):
    """A model whose loss reads nothing on a CPU either."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.image_encoder, self.prompt_learner = torch.nn.Identity(), torch.nn.Linear(8, 3)

    def loss_and_logits(self, features, label):
        logits = self.prompt_learner(features)
        return torch.nn.functional.cross_entropy(logits, label), logits.detach()


@pytest.mark.parametrize("fused", [True, False])
def test_the_loop_around_a_step_reads_only_what_is_old(fused):
    """A trainer as it is on a GPU, but for its device: recorded steps, a fused optimizer, results read late."""
    told_before, recorder, batches = [], Recorder(), make_batches(20, 2)

    class Watched:
        def epoch(self, epoch, first_batch=0):
            read = list(batches.epoch(epoch, first_batch))
            with NoReading():  # also while the loop has a batch
                for batch in read:
                    told_before.append(len(recorder.steps))
                    yield EncodedBatch(batch, torch.ones(2, 8), batch.label)

    trainer = Trainer(
        Linear(),
        batches,
        recipe(),
        precision="fp16",
        observer=recorder,
        features=Watched(),
        launching=Launching(fused, replayed_by_running, under_way=2),
    )
    if fused:
        trainer.fit()
        assert told_before == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7] and len(recorder.steps) == 10
        assert recorder.messages == []  # all could be recorded
    else:
        with pytest.raises(AssertionError, match="the host reads a value"):
            trainer.fit()


def test_the_report_has_the_gradients_largest_value():
    model = Linear()
    scaler = LossScaler(torch.device("cpu"), enabled=False)
    step = loss_and_gradients(model, list(model.parameters()), "fp32", scaler)
    result = step(torch.randn(2, 8), torch.tensor([0, 2]))
    assert result.report[3] == max(one.abs().max() for one in result.gradients) > 0
