"""LayerNorm in Triton against its torch twin in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops.layer_norm import layer_norm_ref

layer_norm = pytest.importorskip("cocoop_fast.kernels.layer_norm")

EPS = 1e-5

# Rows of one and of two leading dimensions; every block, CLIP's widths, widths that are a multiple of nothing.
SHAPES = [
    (1, 512),
    (7, 80),
    (5, 33),
    (3, 3),
    (2, 3, 640),
    (3, 2, 20),
    (2, 768),
    (2, 1024),
    (1, 3, 1280),
    (1, 2048),
]


def twin(x, gamma, beta, dy):
    """LN(x), and the gradient of x where dy is that of the result."""
    exact = x.double().requires_grad_()
    y = layer_norm_ref(exact, Affine(gamma.double(), beta.double(), EPS))
    y.backward(dy.double())
    return y.detach(), exact.grad


@pytest.mark.parametrize("adds", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(buffers, dtype, tolerance, shape, adds):
    d, n = shape[-1], math.prod(shape[:-1])
    before = buffers.randn(*shape, dtype=dtype).add_(2)  # a mean that is not next to nothing
    gamma, beta, bias = (buffers.randn(d, dtype=dtype) for _ in range(3))
    dy, x, passed_on = (
        buffers.randn(*shape, dtype=dtype),
        buffers.copy(before),
        buffers.randn(*shape, dtype=dtype),
    )
    y, mean, rstd = buffers.result(*shape, dtype=dtype), buffers.result(n), buffers.result(n)
    added = (bias, passed_on) if adds else (None, None)
    layer_norm.layer_norm_fwd(x, *added, gamma, beta, EPS, y, mean, rstd)
    if adds:
        assert_close(x, before.double() + bias + passed_on, tolerance, "x")
    else:
        assert torch.equal(x, before)
    y_exact, dx_exact = twin(x, gamma, beta, dy)
    assert_close(y, y_exact, tolerance, "y")
    assert_close(mean, x.double().mean(-1).flatten(), 1e-5, "mean")
    assert_close(rstd, (x.double().var(-1, correction=0).flatten() + EPS).rsqrt(), 1e-5, "rstd")

    dx = buffers.result(*shape, dtype=dtype)
    layer_norm.layer_norm_bwd(dy, x, gamma, mean, rstd, dx, accumulate=False)
    assert_close(dx, dx_exact, tolerance, "dx")
    in_place = buffers.copy(dy)
    layer_norm.layer_norm_bwd(in_place, x, gamma, mean, rstd, in_place, accumulate=False)
    assert torch.equal(in_place, dx)
    residual = buffers.randn(*shape, dtype=dtype)
    dx = buffers.copy(residual)
    layer_norm.layer_norm_bwd(dy, x, gamma, mean, rstd, dx, accumulate=True)
    assert_close(dx, residual.double() + dx_exact, tolerance, "dx added")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_rows_with_fp32_weights(buffers, half):
    x, dy = buffers.randn(3, 96, dtype=half), buffers.randn(3, 96, dtype=half)
    gamma, beta = buffers.randn(96), buffers.randn(96)
    y, dx = buffers.result(3, 96, dtype=half), buffers.result(3, 96, dtype=half)
    mean, rstd = buffers.result(3), buffers.result(3)
    layer_norm.layer_norm_fwd(x, None, None, gamma, beta, EPS, y, mean, rstd)
    layer_norm.layer_norm_bwd(dy, x, gamma, mean, rstd, dx, accumulate=False)
    y_exact, dx_exact = twin(x, gamma, beta, dy)
    assert_close(y, y_exact, 1e-2, "y")
    assert_close(dx, dx_exact, 1e-2, "dx")


def test_a_part_of_each_image(buffers):
    """The gradient of (B M, d) rows goes into the first M rows of each image."""
    dy, x, gamma = buffers.randn(12, 64), buffers.randn(12, 64), buffers.randn(64)
    image_rows = buffers.randn(3, 11, 64)
    before = image_rows.clone()
    mean, rstd = x.mean(-1), (x.var(-1, correction=0) + EPS).rsqrt()
    layer_norm.layer_norm_bwd(dy, x, gamma, mean, rstd, image_rows[:, :4], accumulate=True)
    _, dx_exact = twin(x, gamma, torch.zeros_like(gamma), dy)
    assert_close(image_rows[:, :4], before[:, :4] + dx_exact.view(3, 4, 64), 1e-5)
    assert torch.equal(image_rows[:, 4:], before[:, 4:])


@pytest.mark.parametrize("shared", [False, True], ids=["a residual each", "one for all images"])
def test_residual(buffers, dtype, tolerance, shared):
    before = buffers.randn(3, 5, 80, dtype=dtype)
    x, bias = buffers.copy(before), buffers.randn(80, dtype=dtype)
    residual = buffers.randn(1 if shared else 3, 5, 80, dtype=dtype).expand(3, -1, -1)
    gamma, beta = buffers.randn(80, dtype=dtype), buffers.randn(80, dtype=dtype)
    y, mean, rstd = buffers.result(3, 5, 80, dtype=dtype), buffers.result(15), buffers.result(15)
    layer_norm.layer_norm_fwd(x, bias, residual, gamma, beta, EPS, y, mean, rstd)
    assert_close(x, before.double() + bias + residual, tolerance, "x")
    assert_close(y, twin(x, gamma, beta, y)[0], tolerance, "y")
    with pytest.raises(ValueError, match="`residual` must be None exactly if `bias` is"):
        layer_norm.layer_norm_fwd(x, None, residual, gamma, beta, EPS, y, mean, rstd)


def test_rows_of_one_number(buffers):
    """Such a row is its own mean; of its gradient rounding is left on a GPU, which fuses products with sums."""
    x, gamma, beta = buffers.randn(3, 1), buffers.randn(1), buffers.randn(1)
    y, dx, mean, rstd = (buffers.result(*shape) for shape in ((3, 1), (3, 1), (3,), (3,)))
    layer_norm.layer_norm_fwd(x, None, None, gamma, beta, EPS, y, mean, rstd)
    layer_norm.layer_norm_bwd(y, x, gamma, mean, rstd, dx, accumulate=False)
    assert torch.equal(y, beta.expand(3, 1))
    rounding = torch.finfo(torch.float32).eps if dx.is_cuda else 0.0
    assert bool((dx.abs() <= rounding * (y * gamma).abs() * rstd[:, None]).all())


def test_rows_far_from_zero(device):
    """The variance is that of the centred row: E[x^2] - E[x]^2 would lose every digit here."""
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).to(device) + 1e4
    y, mean, rstd = torch.empty_like(x), x.new_empty(4), x.new_empty(4)
    one, zero = x.new_ones(512), x.new_zeros(512)
    layer_norm.layer_norm_fwd(x, None, None, one, zero, EPS, y, mean, rstd)
    expected = F.layer_norm(x.double(), (512,), eps=EPS)
    assert float((y - expected).abs().max()) < 1e4 * torch.finfo(torch.float32).eps * 4  # that of the mean


def test_no_rows(device):
    for shape in ((0, 16), (2, 0, 16), (0, 2, 16)):
        rows, none = torch.zeros(*shape, device=device), torch.zeros(0, device=device)
        width = torch.ones(16, device=device)
        layer_norm.layer_norm_fwd(rows, width, rows, width, width, EPS, rows, none, none)
        layer_norm.layer_norm_bwd(rows, rows, width, none, none, rows, accumulate=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4)}, r"`x` must have shape \(n, d\) or \(B, n, d\), got \(4,\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "`x` must be float16, bfloat16 or float32, got torch.float64"),
        ({"x": torch.zeros(8, 3).T}, r"`x` must be contiguous in its last dimension, got strides \(1, 3\)"),
        ({"x": torch.zeros(3, 0)}, "`x` must have rows of at least one number"),
        ({"y": torch.zeros(4, 8)}, r"`y` and `x` must have the same number and width of rows, got \(4, 8\) and \(3, 8\)"),
        ({"x": torch.zeros(1, 3, 8), "y": torch.zeros(3, 1, 8)}, "the numbers of rows an image differ"),
        ({"gamma": torch.zeros(7)}, r"`gamma` must be contiguous of shape \(8,\), got \(7,\)"),
        ({"beta": torch.zeros(16)[::2]}, r"`beta` must be contiguous of shape \(8,\), got \(8,\) with strides \(2,\)"),
        ({"mean": torch.zeros(3, dtype=torch.float16)}, "`mean` must be torch.float32, got torch.float16"),
        ({"rstd": torch.zeros(2)}, r"`rstd` must be contiguous of shape \(3,\), got \(2,\)"),
        ({"gamma": torch.zeros(8, device="meta")}, "`gamma` is on meta, other arguments on"),
    ],
)  # fmt: skip
def test_bad_arguments(device, change, message):
    good = {
        "x": torch.zeros(3, 8), "bias": None, "residual": None, "gamma": torch.ones(8), "beta": torch.zeros(8), "eps": EPS,
        "y": torch.zeros(3, 8), "mean": torch.zeros(3), "rstd": torch.zeros(3),
    }  # fmt: skip
    on_device = {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        if isinstance(value, torch.Tensor) and value.device.type != "meta"
        else value
        for name, value in {**good, **change}.items()
    }  # a copy to a GPU would be contiguous
    with pytest.raises(ValueError, match=message):
        layer_norm.layer_norm_fwd(**on_device)


def test_too_wide(device):
    x, d = torch.zeros(1, 2049, device=device), torch.zeros(2049, device=device)
    with pytest.raises(ValueError, match="rows of 2049 numbers: the kernels take at most 2048"):
        layer_norm.layer_norm_fwd(x, None, None, d, d, EPS, x.clone(), d[:1], d[:1].clone())
