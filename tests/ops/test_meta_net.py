"""The Meta-Net by the best backend: which serves, and that all compute the same."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from torch import nn

from cocoop_fast.methods.cocoop import MetaNet
from cocoop_fast.ops import meta_net as ops
from cocoop_fast.ops.meta_net import meta_net_ref, unit_rows, unit_rows_ref

pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for CPUs")


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = MetaNet(32, 20)
    made.backend = "triton"
    return made


@pytest.fixture
def served(monkeypatch):
    """How often the kernel computed a Meta-Net."""
    calls = []
    apply = ops._MetaNet.apply
    monkeypatch.setattr(ops._MetaNet, "apply", lambda *given: calls.append(1) or apply(*given))
    return calls


def test_values_and_gradients_are_those_of_the_layers(net, served):
    x, up = torch.randn(3, 32), torch.randn(20, 3).T  # strided
    exact = [one.detach().double().requires_grad_() for one in net.parameters()]
    expected = meta_net_ref(x.double(), *exact)
    found = net(x)
    assert_close(found, expected, 1e-5)
    gradients = torch.autograd.grad(found, list(net.parameters()), up)
    for one, like in zip(gradients, torch.autograd.grad(expected, exact, up.double()), strict=True):
        assert_close(one, like, 1e-5)
    assert served == [1]
    with torch.no_grad():
        assert net(x).equal(found)


def test_there_is_no_second_derivative(net):
    (gradient,) = torch.autograd.grad(
        net(torch.randn(1, 32)).square().sum(), [net.linear1.weight], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def listened_to(net):
    net.linear1.register_forward_hook(lambda *_: None)


def with_another_layer(net):
    net.relu = nn.GELU()


def without_a_bias(net):
    net.linear2 = nn.Linear(2, 20, bias=False)


def by_torch(net):
    net.backend = "torch"


@pytest.mark.parametrize("change", [listened_to, with_another_layer, without_a_bias, by_torch])
def test_other_layers_and_hooks_are_called_one_by_one(net, served, change):
    x = torch.randn(2, 32)
    change(net)
    assert net(x).equal(nn.Sequential.forward(net, x)) and not served


def test_torch_serves_features_that_learn_and_autocast(net, served):
    x = torch.randn(2, 32, requires_grad=True)
    net(x).sum().backward()
    assert x.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x.detach()).dtype == torch.bfloat16
    assert net.double()(x.detach().double()).dtype == torch.float64
    assert not served


def test_wide_rows_are_torchs(net):
    x = torch.randn(1, 2049)
    assert unit_rows(x, "triton").equal(unit_rows_ref(x))
    wide = MetaNet(2064, 8)
    wide.backend = "triton"
    assert wide(torch.ones(1, 2064)).equal(nn.Sequential.forward(wide, torch.ones(1, 2064)))


def test_unit_rows():
    x = torch.randn(3, 32).half()
    assert_close(unit_rows(x[:, ::2], "triton"), unit_rows_ref(x[:, ::2].double()), 1e-3)
    learning = x.float().requires_grad_()
    unit_rows(learning, "triton").sum().backward()
    assert learning.grad.any()
    assert unit_rows(x, "torch").equal(x / x.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("change", [None, by_torch, listened_to])
def test_features_in_half_precision_give_a_shift_in_float32(net, change):
    x = torch.randn(2, 32).half()
    if change is not None:
        change(net)
    assert net(x).equal(net(x.float())) and net(x).dtype == torch.float32
