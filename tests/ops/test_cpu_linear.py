"""The C++ linear layers against float64 torch: values, fusions, guards, bits, refusals."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import Guarded, assert_close, guarded_like

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops import cpu as cpu_kernels
from cocoop_fast.ops.activation import activation_ref
from cocoop_fast.ops.cpu import PackedLinear
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import GemmLinear

# n, k, width: less than a tile, whole tiles, one row more, columns left over, sums of more than one block
SHAPES = [(1, 1, 1), (3, 5, 7), (14, 32, 32), (15, 64, 96), (29, 48, 40), (6, 600, 33), (100, 1030, 129)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def problem(n, k, width):
    return torch.randn(n, k), torch.randn(width, k), torch.randn(width), torch.randn(n, width)


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_weight(isa, shape):
    _, k, width = shape
    weight = guarded_like(torch.randn(width, k)).tensor
    panels = cpu_kernels.pack_weight(weight)
    columns = panels.transpose(1, 2).reshape(-1, k)
    assert torch.equal(columns[:width], weight)
    assert not columns[width:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(isa, shape):
    x, weight, bias, residual = problem(*shape)
    packed = cpu_kernels.pack_weight(weight)
    product = x.double() @ weight.double().T
    for b in (bias, None):
        for r in (residual, None):
            out = Guarded(*residual.shape)
            cpu_kernels.linear_fwd(guarded_like(x).tensor, packed, b, r, out.tensor)
            expected = product + (0 if b is None else b.double()) + (0 if r is None else r.double())
            assert_close(out.check(), expected, shape[1])
    in_place = residual.clone()
    cpu_kernels.linear_fwd(x, packed, bias, in_place, in_place)
    assert_close(in_place, product + bias.double() + residual.double(), shape[1], "in the residual's place")


@pytest.mark.parametrize("shape", SHAPES)
def test_backward(isa, shape):
    _, weight, _, dy = problem(*shape)
    dx = Guarded(len(dy), weight.shape[1])
    cpu_kernels.linear_bwd(guarded_like(dy).tensor, guarded_like(weight).tensor, dx.tensor)
    assert_close(dx.check(), dy.double() @ weight.double(), shape[2])


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_activation(isa, shape, kind):
    n, k, width = shape
    x, weight, bias, _ = problem(*shape)
    x /= k**0.5  # pre-activations of about unit size
    exact = (x.double() @ weight.double().T + bias.double()).requires_grad_()
    value = activation_ref(exact, kind)
    u, out, alone = (Guarded(n, width) for _ in range(3))
    packed = cpu_kernels.pack_weight(weight)
    cpu_kernels.linear_activation_fwd(guarded_like(x).tensor, packed, bias, kind, u.tensor, out.tensor)
    cpu_kernels.linear_activation_fwd(x, packed, bias, kind, None, alone.tensor)
    assert_close(u.check(), exact, k, "pre-activation")
    assert_close(out.check(), value, k, "activation", scale=1 + float(value.detach().abs().max()))
    assert torch.equal(alone.check(), out.tensor)

    after = torch.randn(k, width)  # the weight of the layer that reads the activation
    dy, du = torch.randn(n, k), Guarded(n, width)
    value.backward(dy.double() @ after.double())
    cpu_kernels.linear_activation_bwd(dy, guarded_like(after).tensor, u.tensor, kind, du.tensor)
    assert_close(du.check(), exact.grad, 2 * k, "gradient")


@pytest.mark.parametrize(
    "platform, openmp, own", [("linux", True, True), ("linux", False, False), ("darwin", True, False)]
)
def test_the_library_multiplies_where_it_has_more_than_the_kernels(
    isa, monkeypatch, platform, openmp, own
):  # fmt: skip
    """Apple's matrix units, or more than one thread."""
    monkeypatch.setattr(cpu_kernels, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(cpu_kernels.CPP.load(), "build_info", lambda: {"openmp": openmp})
    own = own and isa != "portable"
    layer = Affine(torch.randn(40, 8), torch.randn(40))
    linear = cpu_kernels.frozen_linear(layer, packed=True)
    assert type(linear) is (PackedLinear if own else GemmLinear)
    assert linear.packed_bytes == cpu_kernels.packed_bytes(40, 8) == (4 * 64 * 8 if own else 0)
    assert type(cpu_kernels.frozen_linear(layer, packed=False)) is GemmLinear


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
def test_both_implementations_agree(isa, kind):
    x, weight, bias, residual = problem(20, 40, 72)
    layers = PackedLinear(Affine(weight, bias)), GemmLinear(Affine(weight, bias), cpu_kernels)
    norm = Affine(torch.randn(72), torch.randn(72), eps=1e-5)
    wide = Affine(norm.weight.double(), norm.bias.double(), norm.eps)
    expected = F.linear(x.double(), weight.double(), bias.double())
    for layer in layers:
        out, u, act, dx, du = (torch.empty(20, w) for w in (72, 72, 72, 40, 40))
        layer.forward(x, out)
        assert_close(out, expected, 40)
        y, mean, rstd = torch.empty(20, 72), torch.empty(20), torch.empty(20)
        layer.forward_norm(x, residual, out, norm, y, mean, rstd)
        assert_close(out, expected + residual.double(), 40)
        assert_close(y, layer_norm_ref(expected + residual.double(), wide), 72)
        assert_close(mean, (expected + residual.double()).mean(-1), 72)
        layer.forward_activation(x, kind, u, act)
        assert_close(u, expected, 40)
        assert_close(act, activation_ref(expected, kind), 40)
        layer.backward(residual, dx)
        assert_close(dx, residual.double() @ weight.double(), 72)
        layer.backward_activation(residual, x, kind, du)
        slope = x.double().requires_grad_()
        activation_ref(slope, kind).sum().backward()
        assert_close(du, (residual.double() @ weight.double()) * slope.grad, 72)


def test_a_row_does_not_depend_on_the_others(isa, threads):
    """The same bits alone, among any others, and with any number of threads."""
    x, weight, bias, _ = problem(61, 700, 200)
    packed = cpu_kernels.pack_weight(weight)

    def results(rows):
        out, dx = torch.empty(len(rows), 200), torch.empty(len(rows), 200)
        cpu_kernels.linear_fwd(rows, packed, bias, None, out)
        cpu_kernels.linear_bwd(rows, weight.T.contiguous(), dx)
        return out, dx

    threads(1)
    whole = results(x)
    for count in (1, 2, 3, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(results(x), whole, strict=True))
        for part in (slice(0, 1), slice(7, 20), slice(30, 61)):
            alone = results(x[part])
            assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole, strict=True))


def test_nan_stays_in_its_row(isa):
    x, weight, bias, _ = problem(30, 20, 50)
    x[17, 3] = torch.nan
    out = torch.empty(30, 50)
    cpu_kernels.linear_fwd(x, cpu_kernels.pack_weight(weight), bias, None, out)
    assert out.isnan().all(dim=1).nonzero().flatten().tolist() == [17]
    assert out.isnan().sum() == 50


def test_nothing_to_do(isa):
    weight = torch.randn(8, 4)
    packed = cpu_kernels.pack_weight(weight)
    cpu_kernels.linear_fwd(torch.zeros(0, 4), packed, torch.zeros(8), None, torch.zeros(0, 8))
    cpu_kernels.linear_bwd(torch.zeros(0, 8), weight, torch.zeros(0, 4))


def test_bad_arguments(widest_isa):
    x, weight, bias, out = problem(6, 8, 10)
    packed = cpu_kernels.pack_weight(weight)
    with pytest.raises(ValueError, match=r"`x` must have shape \(n, k\), got \(2, 3, 8\)"):
        cpu_kernels.linear_fwd(torch.zeros(2, 3, 8), packed, bias, None, out)
    with pytest.raises(ValueError, match=r"`out` must have shape \(n, width\) with 6 rows, got \(5, 10\)"):
        cpu_kernels.linear_fwd(x, packed, bias, None, out[:5])
    with pytest.raises(ValueError, match=r"`packed` must .* = \(1, 8, 32\), got \(1, 9, 32\)"):
        cpu_kernels.linear_fwd(x, torch.zeros(1, 9, 32), bias, None, out)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(width,\) = \(10,\), got \(8,\)"):
        cpu_kernels.linear_fwd(x, packed, bias[:8], None, out)
    with pytest.raises(ValueError, match=r"`residual` must have shape \(6, 10\), got \(6, 9\)"):
        cpu_kernels.linear_fwd(x, packed, bias, out[:, :9], out)
    with pytest.raises(ValueError, match="`x` must be contiguous in its last dimension"):
        cpu_kernels.linear_fwd(torch.zeros(8, 6).T, packed, bias, None, out)
    with pytest.raises(ValueError, match=r"`weight` must have shape \(10, 8\)"):
        cpu_kernels.linear_bwd(out, weight.T, x)
    with pytest.raises(ValueError, match=r"`u` must have shape \(6, 10\)"):
        cpu_kernels.linear_activation_fwd(x, packed, bias, "gelu", torch.zeros(6, 9), out)
    with pytest.raises(ValueError, match="`kind` must be quick_gelu or gelu, got 'relu'"):
        cpu_kernels.linear_activation_bwd(out, weight, x, "relu", x)
    with pytest.raises(ValueError, match="`out` must have rows that do not overlap"):
        cpu_kernels.linear_fwd(x, packed, bias, None, torch.zeros(1, 10).expand(6, 10))
