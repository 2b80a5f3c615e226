"""Linear layers with their epilogues in Triton against the torch twins in float64."""

from types import SimpleNamespace

import pytest
import torch
from comparison import assert_close

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops.activation import activation_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref

linear = pytest.importorskip("cocoop_fast.kernels.linear")

# Rows, inner, width: a tile partly filled; two tiles each way and two steps inside; numbers that are multiples of nothing.
SHAPES = [(1, 16, 16), (70, 40, 96), (3, 33, 5)]


def layer(buffers, width, inner, dtype):
    weight = buffers.copy(torch.randn(width, inner, generator=buffers.generator).to(dtype) / inner**0.5)
    return Affine(weight, buffers.randn(width, dtype=dtype, contiguous=True))


def exact(one):
    return Affine(one.weight.double(), one.bias.double(), getattr(one, "eps", 0.0))


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation(buffers, dtype, tolerance, shape, kind):
    rows, inner, width = shape
    x, own = buffers.randn(rows, inner, dtype=dtype), layer(buffers, width, inner, dtype)
    u, out = (buffers.result(rows, width, dtype=dtype) for _ in range(2))
    linear.linear_activation_fwd(x, own.weight, own.bias, kind, u, out)
    expected = linear_ref(x.double(), exact(own))
    assert_close(u, expected, tolerance, "u")
    assert_close(out, activation_ref(u.double(), kind), tolerance, "activation")
    alone = buffers.result(rows, width, dtype=dtype)
    linear.linear_activation_fwd(x, own.weight, own.bias, kind, None, alone)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slope(buffers, dtype, tolerance, shape, kind):
    rows, inner, width = shape
    dy, own = buffers.randn(rows, inner, dtype=dtype), layer(buffers, inner, width, dtype)
    u, du = buffers.randn(rows, width, dtype=dtype), buffers.result(rows, width, dtype=dtype)
    linear.linear_activation_bwd(dy, own.weight, kind, u, du)
    at = u.double().requires_grad_()
    activation_ref(at, kind).backward(dy.double() @ own.weight.double())
    assert_close(du, at.grad, tolerance)


@pytest.mark.parametrize("shape", [(1, 16, 16), (40, 40, 48), (3, 33, 5)], ids=str)
@pytest.mark.parametrize("norm_type", ["same", "fp32"])
def test_norm(buffers, dtype, tolerance, shape, norm_type):
    """With the LayerNorms in fp32 as well, as OpenAI's CLIP has them."""
    rows, inner, width = shape
    x, own = buffers.randn(rows, inner, dtype=dtype), layer(buffers, width, inner, dtype)
    kind = dtype if norm_type == "same" else torch.float32
    norm = Affine(*(buffers.randn(width, dtype=kind, contiguous=True) for _ in range(2)), 1e-5)
    residual = buffers.randn(rows, width, dtype=dtype)
    out, y = (buffers.result(rows, width, dtype=dtype) for _ in range(2))
    mean, rstd = (buffers.result(rows, contiguous=True) for _ in range(2))
    linear.linear_norm_fwd(
        x, own.weight, own.bias, residual, norm.weight, norm.bias, norm.eps, out, y, mean, rstd
    )
    expected = linear_ref(x.double(), exact(own)) + residual.double()
    assert_close(out, expected, tolerance, "row")
    assert_close(y, layer_norm_ref(out.double(), exact(norm)), tolerance, "LayerNorm of the row")
    assert_close(mean, out.double().mean(dim=1), 1e-5, "mean")
    variance = out.double().var(dim=1, unbiased=False)
    assert_close(rstd, (variance + norm.eps).rsqrt(), 1e-5, "rstd")

    # Backward: a layer of its own before the LayerNorm's gradient.
    dy, after = buffers.randn(rows, inner, dtype=dtype), layer(buffers, inner, width, dtype)
    at = out.double().requires_grad_()
    layer_norm_ref(at, exact(norm)).backward(dy.double() @ after.weight.double())
    dx = buffers.result(rows, width, dtype=dtype)
    linear.linear_norm_bwd(dy, after.weight, out, norm.weight, mean, rstd, dx, accumulate=False)
    assert_close(dx, at.grad, tolerance, "gradient")
    passed = buffers.randn(rows, width, dtype=dtype)
    expected = passed.double() + at.grad
    linear.linear_norm_bwd(dy, after.weight, out, norm.weight, mean, rstd, passed, accumulate=True)
    assert_close(passed, expected, tolerance, "gradient added")


def test_many_rows_take_the_large_tiles(buffers):
    x, own = buffers.randn(linear.FEW_ROWS + 1, 8), layer(buffers, 8, 8, torch.float32)
    u, out = (buffers.result(len(x), 8) for _ in range(2))
    linear.linear_activation_fwd(x, own.weight, own.bias, "gelu", u, out)
    assert_close(u, linear_ref(x.double(), exact(own)), 1e-5)


def test_no_rows(device):
    x, w, b, none = (torch.zeros(*shape, device=device) for shape in ((0, 8), (8, 8), (8,), (0,)))
    linear.linear_activation_fwd(x, w, b, "gelu", None, x)
    linear.linear_activation_bwd(x, w, "gelu", x, x)
    linear.linear_norm_fwd(x, w, b, x, b, b, 1e-5, x, x, none, none)
    linear.linear_norm_bwd(x, w, x, b, none, none, x, accumulate=True)


def test_bad_arguments(device):
    x, w, b = (torch.zeros(*shape, device=device) for shape in ((2, 8), (16, 8), (16,)))
    out = x.new_zeros(2, 16)
    with pytest.raises(ValueError, match="`kind` must be quick_gelu or gelu, got 'relu'"):
        linear.linear_activation_fwd(x, w, b, "relu", None, out)
    with pytest.raises(ValueError, match=r"a product of torch.float32 \(2, 8\) with W\^T"):
        linear.linear_activation_fwd(x, w[:, :4], b, "gelu", None, out)
    with pytest.raises(ValueError, match=r"`bias` must be contiguous of shape \(16,\)"):
        linear.linear_activation_fwd(x, w, b[:8], "gelu", None, out)
    wide = x.new_zeros(2, 2000)
    assert linear.takes_whole_rows(out) and not linear.takes_whole_rows(wide)
    with pytest.raises(ValueError, match="rows of 2000 numbers: a program takes at most 512"):
        one, stat = x.new_zeros(2000), x.new_zeros(2)
        linear.linear_norm_fwd(x, x.new_zeros(2000, 8), one, wide, one, one, 1e-5, wide, wide, stat, stat)


@pytest.mark.parametrize(
    "capability, hip, allowed, expected",
    [
        ((8, 0), None, "high", "tf32"),
        ((8, 0), None, "highest", "ieee"),
        ((7, 5), None, "high", "ieee"),  # has none, and Triton 3.2 fails to compile it there
        ((9, 4), "6.2", "high", "ieee"),
    ],
)
def test_tf32_is_asked_of_gpus_that_have_it(monkeypatch, capability, hip, allowed, expected):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: allowed)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_gpu = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda"))
    assert linear._precision(on_gpu) == expected
    on_gpu.dtype = torch.float16
    assert linear._precision(on_gpu) == "ieee"
