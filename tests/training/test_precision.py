"""Loss scaling and the optimizer: what is skipped, counted and carried over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cocoop_fast import UserError
from cocoop_fast.config import OptimConfig
from cocoop_fast.training.optimizer import build_optimizer
from cocoop_fast.training.precision import LossScaler, needs_loss_scaling

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("precision", "master_weights", "device", "scaled"),
    [
        ("fp32", True, GPU, False),
        ("bf16", True, GPU, False),
        ("fp16", True, GPU, True),
        ("fp16", True, CPU, True),
        ("fp16", False, GPU, False),  # as the reference
        ("amp", True, GPU, True),
        ("amp", True, CPU, False),  # bfloat16 there
    ],
)
def test_who_scales(precision, master_weights, device, scaled):
    assert needs_loss_scaling(precision, master_weights, device) == scaled


class Run:
    """A few steps on random gradients; those whose number is in ``overflows`` are infinite."""

    def __init__(self, *, fused=False, enabled=True, known=False):
        generator = torch.Generator().manual_seed(0)
        self.parameter = nn.Parameter(torch.randn(5, 7, generator=generator))
        self.gradients = torch.randn(20, 5, 7, generator=generator)
        self.optimizer = build_optimizer([self.parameter], OptimConfig(lr=0.1), fused=fused)
        self.known = known
        self.scaler = LossScaler(CPU, enabled=enabled)
        self.scales = []

    def step(self, number, *, overflow=False):
        self.scales.append(self.scaler.current().item())
        self.scaler.observe(self.scales[-1])
        loss = self.scaler.current() * (self.parameter * self.gradients[number]).sum()
        (self.parameter.grad,) = torch.autograd.grad(loss * (math.inf if overflow else 1), [self.parameter])
        told = self.parameter.grad.isfinite().all().logical_not().float() if self.known else None
        self.scaler.step(self.optimizer, told)


def test_steps_that_overflow_change_nothing_but_the_scale():
    run, clean = Run(), Run(enabled=False)
    for number in range(6):
        before = run.parameter.detach().clone()
        run.step(number, overflow=number in (0, 3))
        if number in (0, 3):
            assert run.parameter.equal(before)
        else:
            clean.step(number)
    run.scaler.settle()
    assert run.scaler.skipped == 2 and clean.scaler.skipped == 0
    assert run.scales == [2.0**16, *[2.0**15] * 3, *[2.0**14] * 2]
    assert run.parameter.equal(clean.parameter)  # powers of two divide out


def test_a_skip_is_counted_when_the_next_scale_is_seen_or_when_settled():
    run = Run()
    run.step(0, overflow=True)
    assert run.scaler.skipped == 0
    run.step(1)
    assert run.scaler.skipped == 1
    run.step(2, overflow=True)
    run.scaler.settle()
    run.scaler.settle()
    assert run.scaler.skipped == 2


def test_state_carries_scale_growth_and_count_over():
    whole, first, second = Run(), Run(), Run()
    overflows = (0, 2, 5)
    for number in range(8):
        whole.step(number, overflow=number in overflows)
    for number in range(4):
        first.step(number, overflow=number in overflows)
    first.scaler.settle()
    second.parameter.data.copy_(first.parameter)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scaler.load_state_dict(first.scaler.state_dict())
    for number in range(4, 8):
        second.step(number, overflow=number in overflows)
    for run in (whole, second):
        run.scaler.settle()
    assert second.scaler.state_dict() == whole.scaler.state_dict() and whole.scaler.skipped == 3
    assert second.parameter.equal(whole.parameter)


def test_states_of_runs_with_and_without_scaling_do_not_mix():
    on, off = LossScaler(CPU, enabled=True), LossScaler(CPU, enabled=False)
    assert off.state_dict() == {} and off.current() == 1
    before = on.state_dict()
    on.load_state_dict({})
    off.load_state_dict(before)
    assert on.state_dict() == before and off.state_dict() == {}


def test_gradients_that_always_overflow_stop_the_run():
    run = Run()
    with pytest.raises(UserError, match=r"overflow in float16 even .*use precision bf16 or fp32") as error:
        for _ in range(40):
            run.step(0, overflow=True)
    assert error.value.exit_status == 1 and run.scaler.skipped == 33 and run.parameter.isfinite().all()


@pytest.mark.parametrize("overflow", [(), (0,), (0, 1, 4)])
def test_the_fused_optimizer_takes_the_same_steps(overflow):
    """Also when the very first step is skipped: torch's fused kernel has no momentum then."""
    plain, fused = Run(), Run(fused=True)
    for number in range(8):
        for run in (plain, fused):
            run.step(number, overflow=number in overflow)
    torch.testing.assert_close(fused.parameter, plain.parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_overflows_that_are_known_need_no_search(monkeypatch, fused):
    """The same bits of parameters, momentum and state as by torch's GradScaler, which looks for what is not finite itself."""
    search, known = Run(fused=fused), Run(fused=fused, known=True)
    for run in (search, known):
        run.scaler.load_state_dict({**run.scaler.state_dict(), "growth_interval": 3})
    for number in range(12):
        search.step(number, overflow=number in (0, 1, 7))
    if fused:
        monkeypatch.delattr(torch.amp.GradScaler, "step")
    for number in range(12):
        known.step(number, overflow=number in (0, 1, 7))
    assert known.scales == search.scales and max(search.scales[3:]) > min(search.scales[3:])
    assert known.parameter.equal(search.parameter)
    momentum = [run.optimizer.state[run.parameter]["momentum_buffer"] for run in (known, search)]
    assert momentum[0].equal(momentum[1])
    assert known.scaler.state_dict() == search.scaler.state_dict()
    assert not {"grad_scale", "found_inf"} & vars(known.optimizer).keys()


def test_a_checkpoint_does_not_decide_how_this_machine_steps():
    plain, fused = Run(), Run(fused=True)
    plain.step(0), fused.step(0)
    states = plain.optimizer.state_dict(), fused.optimizer.state_dict()
    fused.optimizer.load_state_dict(states[0])
    plain.optimizer.load_state_dict(states[1])
    assert fused.optimizer.param_groups[0]["fused"] is True
    assert plain.optimizer.param_groups[0]["fused"] is None
