"""The C++ operations on rows against their torch twins in float64, forward and backward, under every instruction set."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_testing import Guarded, assert_close, guarded_like

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops import cpu as cpu_kernels
from cocoop_fast.ops.activation import activation_ref
from cocoop_fast.ops.assemble_prompts import assemble_context_ref, assemble_dense_ref
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.head import cosine_logits_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref

EPS = 1e-5

# Rows of one and of two leading dimensions; widths that are a multiple of every vector, of none, and below all.
SHAPES = [(1, 512), (7, 80), (5, 33), (3, 1), (2, 3, 64), (3, 5, 20)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# layer_norm


def layer_norm_case(shape):
    x, dy = torch.randn(*shape) * 3 + 2, torch.randn(*shape)
    gamma, beta, bias = torch.randn(shape[-1]), torch.randn(shape[-1]), torch.randn(shape[-1])
    return x, dy, gamma, beta, bias


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(isa, shape, adds):
    x, dy, gamma, beta, bias = layer_norm_case(shape)
    passed_on = torch.randn(*shape)
    moved = (x + bias) + passed_on if adds else x
    exact = moved.double().requires_grad_()
    y_exact = layer_norm_ref(exact, Affine(gamma.double(), beta.double(), EPS))
    y_exact.backward(dy.double())

    rows, y, n = guarded_like(x), Guarded(*shape), math.prod(shape[:-1])
    mean, rstd = Guarded(n), Guarded(n)
    added = (bias, guarded_like(passed_on).tensor) if adds else (None, None)
    cpu_kernels.layer_norm_fwd(rows.tensor, *added, gamma, beta, EPS, y.tensor, mean.tensor, rstd.tensor)
    assert torch.equal(rows.check(), moved)
    d = shape[-1]
    assert_close(y.check(), y_exact, d, "y")
    assert_close(mean.check(), moved.double().mean(-1).flatten(), d, "mean")
    variance = moved.double().var(-1, correction=0).flatten()
    assert_close(rstd.check(), (variance + EPS).rsqrt(), d, "rstd")

    residual = torch.randn(*shape)
    largest = 1 + float((dy * gamma).abs().max() * rstd.tensor.max()) if n else 1.0
    for accumulate in (True, False):
        dx = guarded_like(residual)
        arguments = (guarded_like(dy).tensor, rows.tensor, gamma, mean.tensor, rstd.tensor, dx.tensor)
        cpu_kernels.layer_norm_bwd(*arguments, accumulate=accumulate)
        assert_close(
            dx.check(), exact.grad + residual * accumulate, d, f"dx, accumulate={accumulate}", largest
        )


def test_layer_norm_of_a_part_of_each_image(isa):
    """The context rows of each image: three dimensions, the outer stride that of an image."""
    x, dy, gamma, _, _ = layer_norm_case((3, 4, 64))
    image_rows = torch.randn(3, 11, 64)
    dx = image_rows.clone()
    mean, rstd = x.mean(-1), (x.var(-1, correction=0) + EPS).rsqrt()
    cpu_kernels.layer_norm_bwd(dy, x, gamma, mean.flatten(), rstd.flatten(), dx[:, :4], accumulate=True)
    exact = x.double().requires_grad_()
    layer_norm_ref(exact, Affine(gamma.double(), torch.zeros(64).double(), EPS)).backward(dy.double())
    assert_close(dx[:, :4], exact.grad + image_rows[:, :4], 64)
    assert torch.equal(dx[:, 4:], image_rows[:, 4:])


def test_layer_norm_of_rows_far_from_zero(isa):
    """The variance is that of the centred row: E[x^2] - E[x]^2 would lose every digit here."""
    x = torch.randn(4, 512) + 1e4
    y, mean, rstd = torch.empty(4, 512), torch.empty(4), torch.empty(4)
    cpu_kernels.layer_norm_fwd(x, None, None, torch.ones(512), torch.zeros(512), EPS, y, mean, rstd)
    expected = F.layer_norm(x.double(), (512,), eps=EPS)
    assert float((y - expected).abs().max()) < 1e4 * torch.finfo(torch.float32).eps * 4  # that of the mean


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4)}, r"`x` must have shape \(n, d\) or \(B, n, d\), got \(4,\)"),
        ({"x": torch.zeros(3, 0)}, "`x` must have rows of at least one number"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "float32 tensors on the CPU here, got torch.float64"),
        ({"x": torch.zeros(8, 3).T}, "`x` must be contiguous in its last dimension, got a stride of 12 bytes"),
        ({"x": torch.zeros(8).expand(3, 8)}, "`x` must have rows that do not overlap, got a stride of 0 floats over 8"),
        ({"y": torch.zeros(16).as_strided((3, 8), (4, 1), 0)}, "`y` must have rows that do not overlap"),
        ({"y": torch.zeros(4, 8)}, r"`y` must have 3 rows of 8, got \(4, 8\)"),
        ({"gamma": torch.zeros(7)}, r"`gamma` must have shape \(d,\) = \(8,\), got \(7,\)"),
        ({"beta": torch.zeros(16)[::2]}, r"`beta` must be contiguous, got strides of \(8,\) bytes"),
        ({"mean": torch.zeros(3, 1)}, r"`mean` must have shape \(n,\) = \(3,\), got \(3, 1\)"),
        ({"rstd": torch.zeros(2)}, r"`rstd` must have shape"),
        ({"eps": -1.0}, "`eps` must not be negative, got -1"),
        ({"eps": math.nan}, "`eps` must not be negative, got nan"),
        ({"bias": None}, r"`residual` must be None exactly if `bias` is, got \(3, 8\)"),
        ({"residual": None}, "`residual` must be None exactly if `bias` is, got None"),
        ({"residual": torch.zeros(3, 7)}, r"`residual` must have 3 rows of 8, got \(3, 7\)"),
    ],
)  # fmt: skip
def test_bad_layer_norm_arguments(widest_isa, change, message):
    good = {
        "x": torch.zeros(3, 8), "bias": torch.zeros(8), "residual": torch.zeros(3, 8), "gamma": torch.ones(8), "beta": torch.zeros(8), "eps": EPS,
        "y": torch.zeros(3, 8), "mean": torch.zeros(3), "rstd": torch.zeros(3),
    }  # fmt: skip
    cpu_kernels.layer_norm_fwd(**good)
    with pytest.raises(ValueError, match=message):
        cpu_kernels.layer_norm_fwd(**{**good, **change})


def test_arrays_that_tensors_cannot_be(widest_isa):
    """Foreign byte order, odd addresses, strides of half a float, read-only memory."""
    extension = CPP.load()
    good = np.zeros((2, 4), dtype=np.float32)
    odd = np.zeros(36, dtype=np.int8)[1:33].view(np.float32).reshape(2, 4)
    half = np.zeros(36, dtype=np.int8)
    half = np.lib.stride_tricks.as_strided(half.view(np.float32)[:4], (2, 4), (18, 4))
    read_only = good.copy()
    read_only.flags.writeable = False
    for out, message in [
        (good.astype(">f4"), "`out` must be float32, got >f4"),
        (odd, "`out` must be aligned"),
        (half, "`out` must have strides of whole floats, got 18 bytes"),
        (read_only, "`out` must be writeable"),
    ]:
        with pytest.raises(ValueError, match=message):
            extension.activation_fwd(good, "gelu", out)
    with pytest.raises(TypeError):
        extension.activation_fwd([[1.0]], "gelu", good)


# activation


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activation(isa, shape, kind):
    u, dg = torch.randn(*shape) * 2, torch.randn(*shape)
    exact = u.double().requires_grad_()
    activation_ref(exact, kind).backward(dg.double())
    out, changed = Guarded(*shape), guarded_like(dg)
    cpu_kernels.activation_fwd(guarded_like(u).tensor, kind, out.tensor)
    assert_close(out.check(), activation_ref(exact, kind), 1, "value")
    cpu_kernels.activation_bwd(guarded_like(u).tensor, kind, changed.tensor)
    assert_close(changed.check(), exact.grad, 1, "gradient")
    in_place = u.clone()
    cpu_kernels.activation_fwd(in_place, kind, in_place)
    assert torch.equal(in_place, out.tensor)


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
def test_activation_everywhere(isa, kind):
    """Within a few units of rounding of max(1, |u|), and in the tails too; no point of the real line is special."""
    u = torch.cat(
        [torch.linspace(-12, 12, 100_001), torch.tensor([-1e30, -200, -60, 60, 200, 1e30, 0.0, -0.0])]
    )
    exact = u.double().requires_grad_()
    value = activation_ref(exact, kind)
    value.backward(torch.ones_like(value))
    out, dg = torch.empty(1, len(u)), torch.ones(1, len(u))
    cpu_kernels.activation_fwd(u[None], kind, out)
    cpu_kernels.activation_bwd(u[None], kind, dg)
    unit = torch.finfo(torch.float32).eps
    assert float(((out[0] - value).detach() / exact.detach().abs().clamp(min=1)).abs().max()) < 4 * unit
    assert float((dg[0] - exact.grad).abs().max()) < 10 * unit
    if kind == "gelu":  # e^(-u^2 / 2) u Phi(u) to relative accuracy where 1 + erf has none left
        tail = (u > -10) & (u < -2)
        twice_phi = torch.special.erfc(-exact[tail].detach() / math.sqrt(2))
        relative = out[0][tail] / (exact[tail].detach() * twice_phi / 2) - 1
        assert float(relative.abs().max()) < 4 * unit * 50  # the rounding of u^2 / 2 <= 50 in the exponent


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
def test_activation_keeps_nan(isa, kind):
    u = torch.zeros(1, 40)
    u[0, 17] = torch.nan
    out, dg = torch.empty(1, 40), torch.ones(1, 40)
    cpu_kernels.activation_fwd(u, kind, out)
    cpu_kernels.activation_bwd(u, kind, dg)
    assert out.isnan().nonzero().tolist() == dg.isnan().nonzero().tolist() == [[0, 17]]


def test_bad_activation_arguments(widest_isa):
    u = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="`kind` must be quick_gelu or gelu, got 'relu'"):
        cpu_kernels.activation_fwd(u, "relu", u)
    with pytest.raises(ValueError, match=r"`dg` must have 2 rows of 8, got \(3, 8\)"):
        cpu_kernels.activation_bwd(u, "gelu", torch.zeros(3, 8))


# assemble_prompts


@pytest.mark.parametrize("form", ["image", "row", "row alone"])
@pytest.mark.parametrize("batch, m, d", [(1, 4, 512), (3, 1, 33), (2, 16, 20)])
def test_assemble_prompts(isa, batch, m, d, form):
    """A shift of each image, of each of its rows, and whole contexts that share no vectors."""
    vectors, position = None if form == "row alone" else torch.randn(m, d), torch.randn(m, d)
    shift = torch.randn(batch, d) if form == "image" else torch.randn(batch, m, d)
    gamma, beta, dx = torch.randn(d), torch.randn(d), torch.randn(batch, m, d)
    x, y, mean, rstd = Guarded(batch, m, d), Guarded(batch, m, d), Guarded(batch * m), Guarded(batch * m)
    cpu_kernels.assemble_prompts_fwd(
        vectors, shift, position, gamma, beta, EPS, x.tensor, y.tensor, mean.tensor, rstd.tensor
    )
    shared = torch.zeros(m, d) if vectors is None else vectors
    rows = assemble_context_ref(shared.double(), shift.double()) + position
    assert_close(x.check(), rows, 3, "x")
    assert_close(y.check(), layer_norm_ref(rows, Affine(gamma.double(), beta.double(), EPS)), d, "y")
    assert_close(mean.check(), rows.mean(-1).flatten(), d, "mean")
    assert_close(rstd.check(), (rows.var(-1, correction=0).flatten() + EPS).rsqrt(), d, "rstd")

    d_vectors, d_shift = (
        None if vectors is None else torch.full((m, d), torch.nan),
        torch.full_like(shift, torch.nan),
    )
    cpu_kernels.assemble_prompts_bwd(guarded_like(dx).tensor, d_vectors, d_shift)
    if d_vectors is not None:
        assert_close(d_vectors, dx.double().sum(0), batch, "d_vectors")
    if form == "image":
        assert_close(d_shift, dx.double().sum(1), m, "d_shift")
    else:
        assert torch.equal(d_shift, dx)


@pytest.mark.parametrize(
    "batch, k, m, length, d", [(2, 3, 4, 9, 33), (1, 1, 1, 2, 8), (0, 3, 4, 9, 8), (2, 0, 1, 4, 8)]
)
def test_assemble_dense(isa, batch, k, m, length, d):
    context, prefix = torch.randn(batch, m, d), torch.randn(k, d)
    suffix, out = torch.randn(k, length - 1 - m, d), torch.full((batch, k, length, d), torch.nan)
    cpu_kernels.assemble_dense(context, prefix, suffix, out)
    assert torch.equal(out, assemble_dense_ref(context, prefix, suffix))


def test_bad_assemble_arguments(widest_isa):
    z = torch.zeros
    with pytest.raises(ValueError, match=r"`vectors` must have shape \(M, d\) = \(3, 8\), got \(2, 8\)"):
        cpu_kernels.assemble_prompts_fwd(
            z(2, 8), z(1, 8), z(3, 8), z(8), z(8), EPS, z(1, 3, 8), z(1, 3, 8), z(3), z(3)
        )
    with pytest.raises(ValueError, match=r"`shift` must have shape \(B, d\) or \(B, M, d\), got \(8,\)"):
        cpu_kernels.assemble_prompts_fwd(
            z(2, 8), z(8), z(2, 8), z(8), z(8), EPS, z(1, 2, 8), z(1, 2, 8), z(2), z(2)
        )
    with pytest.raises(ValueError, match=r"`d_shift` must have shape \(B, d\) = \(1, 8\), got \(2, 8\)"):
        cpu_kernels.assemble_prompts_bwd(z(1, 2, 8), z(2, 8), z(2, 8))
    with pytest.raises(ValueError, match=r"`d_shift` must have shape \(B, M, d\) = \(1, 2, 8\)"):
        cpu_kernels.assemble_prompts_bwd(z(1, 2, 8), None, z(1, 3, 8))
    with pytest.raises(
        ValueError, match=r"`out` must have shape \(B, K, L, d\) = \(1, 3, 6, 8\), got \(1, 3, 7, 8\)"
    ):
        cpu_kernels.assemble_dense(z(1, 2, 8), z(3, 8), z(3, 3, 8), z(1, 3, 7, 8))


# head


@pytest.mark.parametrize("batch, k, width", [(1, 100, 512), (3, 1, 33), (2, 37, 20), (1, 2500, 8)])
def test_head(isa, batch, k, width):
    scale, grad_loss = torch.tensor([100.0]), torch.tensor([0.7])
    features, image = torch.randn(batch, k, width) * 5, F.normalize(torch.randn(batch, width), dim=-1)
    labels = torch.randint(k, (batch,))
    exact = features.double().requires_grad_()
    expected = cosine_logits_ref(image.double(), exact, scale.double().log())
    loss_exact = F.cross_entropy(expected, labels)
    d_logits_exact, d_features_exact = torch.autograd.grad(loss_exact * 0.7, (expected, exact))

    logits, norms = torch.empty(batch, k), torch.empty(batch, k)
    cpu_kernels.head_fwd(guarded_like(features).tensor, image, scale.log(), logits, norms)
    assert_close(logits, expected, width, "logits")
    assert_close(norms, 1 / exact.norm(dim=-1), width, "inverse norms")
    logit_error = torch.finfo(torch.float32).eps * (8 + width**0.5) * float(expected.detach().abs().max())
    assert abs(cross_entropy(logits, labels) - float(loss_exact.detach())) <= 2 * logit_error + 1e-6

    # From exact logits on: an error of the logits is multiplied by the softmax's slope, and is no error of backward.
    logits = expected.detach().float()
    d_logits = torch.empty(batch, k)
    cpu_kernels.cross_entropy_bwd(logits, labels, grad_loss, d_logits)
    rounded = logits.double().requires_grad_()
    (d_rounded,) = torch.autograd.grad(F.cross_entropy(rounded, labels) * 0.7, rounded)
    if k > 1:  # else both are zero
        assert float((d_logits - d_rounded).abs().max()) < 1e-6 * 0.7 / batch
    d_features = Guarded(batch, k, width)
    arguments = (features, image, scale.log(), logits, norms, d_logits_exact.float(), d_features.tensor)
    cpu_kernels.head_bwd(*arguments)
    if k > 1:
        assert_close(d_features.check(), d_features_exact, width, "d_features")


def cross_entropy(logits, labels):
    loss = torch.full((1,), torch.nan)
    cpu_kernels.cross_entropy_fwd(logits, labels, loss)
    return float(loss)


def test_cross_entropy_is_stable(isa):
    logits = torch.tensor([[3e4, -3e4, 0.0], [-1e30, 1e30, 1e30]])
    labels = torch.tensor([1, 2])
    assert cross_entropy(logits, labels) == pytest.approx((6e4 + math.log(2)) / 2, rel=1e-6)
    d_logits = torch.empty(2, 3)
    cpu_kernels.cross_entropy_bwd(logits, labels, torch.tensor([2.0]), d_logits)
    assert_close(d_logits, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.5, -0.5]], dtype=torch.float64), 1)
    for column in (1, 2):  # the label's, another
        with_nan = logits.clone()
        with_nan[0, column] = torch.nan
        assert math.isnan(cross_entropy(with_nan, labels))
        cpu_kernels.cross_entropy_bwd(with_nan, labels, torch.ones(1), d_logits)
        assert d_logits[0].isnan().all() and not d_logits[1].isnan().any()


@pytest.mark.parametrize("label", [0, 1, 40, 99])
@pytest.mark.parametrize("lead", [10.0, 17.0, 40.0])
def test_the_gradient_of_a_label_that_is_nearly_certain(isa, label, lead):
    """1 - p is all of its gradient, and next to 1 single precision has nothing of it."""
    logits = torch.randn(1, 100)
    logits[0, label] = lead
    labels = torch.tensor([label])
    expected = logits.double().softmax(dim=-1)
    expected[0, label] = 0
    others = float(expected.sum())
    expected[0, label] = -others
    d_logits = torch.empty(1, 100)
    cpu_kernels.cross_entropy_bwd(logits, labels, torch.ones(1), d_logits)
    assert float((d_logits / expected - 1).abs().max()) < 2e-5
    assert cross_entropy(logits, labels) == pytest.approx(-math.log1p(-others), rel=2e-5, abs=0)


def test_bad_head_arguments(widest_isa):
    z = torch.zeros
    with pytest.raises(ValueError, match=r"`image` must have shape \(B, E\) = \(2, 8\), got \(1, 8\)"):
        cpu_kernels.head_fwd(z(2, 3, 8), z(1, 8), z(1), z(2, 3), z(2, 3))
    with pytest.raises(ValueError, match=r"`labels` must be classes 0 .. 2, got 3 at 1"):
        cpu_kernels.cross_entropy_fwd(z(2, 3), torch.tensor([0, 3]), z(1))
    with pytest.raises(ValueError, match=r"`labels` must be classes 0 .. 2, got -1 at 0"):
        cpu_kernels.cross_entropy_bwd(z(2, 3), torch.tensor([-1, 0]), z(1), z(2, 3))
    with pytest.raises(ValueError, match=r"torch.int64 tensors on the CPU here, got torch.int32"):
        cpu_kernels.cross_entropy_fwd(z(1, 3), torch.tensor([0], dtype=torch.int32), z(1))
    with pytest.raises(ValueError, match=r"`d_features` must have 6 rows of 8, got \(2, 3, 7\)"):
        cpu_kernels.head_bwd(z(2, 3, 8), z(2, 8), z(1), z(2, 3), z(2, 3), z(2, 3), z(2, 3, 7))


# move_rows


@pytest.mark.parametrize("batch, rows, d", [(1, 9, 512), (3, 5, 33), (2, 4, 1)])
def test_move_rows(isa, batch, rows, d):
    x, index = torch.randn(batch, rows, d), torch.randperm(rows)[: rows - 2]
    out = Guarded(batch, len(index), d)
    cpu_kernels.gather_rows(guarded_like(x).tensor, index, out.tensor)
    assert torch.equal(out.check(), x[:, index])
    expected, target = x.clone(), guarded_like(x)
    moved = torch.randn(batch, len(index), d)
    expected[:, index] = expected[:, index] + moved
    cpu_kernels.add_rows(guarded_like(moved).tensor, index, target.tensor)
    assert torch.equal(target.check(), expected)


def test_bad_move_arguments(widest_isa):
    x, out = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r"`index` must be rows 0 .. 3, got 4 at 1"):
        cpu_kernels.gather_rows(x, torch.tensor([0, 4]), out)
    with pytest.raises(ValueError, match=r"`index` must be rows 0 .. 3, got -1 at 0"):
        cpu_kernels.gather_rows(x, torch.tensor([-1, 2]), out)
    with pytest.raises(ValueError, match=r"`out` must have shape \(B, n, d\) = \(1, 3, 8\), got \(1, 2, 8\)"):
        cpu_kernels.gather_rows(x, torch.tensor([0, 1, 2]), out)
    with pytest.raises(ValueError, match="`index` must have no row twice, got 1 at 1"):
        cpu_kernels.add_rows(out, torch.tensor([1, 1]), x)


# all


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 2, 16)])
def test_no_rows(isa, shape):
    rows, none, width = torch.zeros(*shape), torch.zeros(0), torch.ones(16)
    cpu_kernels.layer_norm_fwd(rows, width, rows, width, width, EPS, rows, none, none)
    cpu_kernels.layer_norm_bwd(rows, rows, width, none, none, rows, accumulate=True)
    cpu_kernels.activation_fwd(rows, "gelu", rows)
    cpu_kernels.activation_bwd(rows, "gelu", rows)
    if len(shape) == 3:
        pairs, no_index, one = torch.zeros(shape[:2]), torch.zeros(0, dtype=torch.int64), torch.ones(1)
        cpu_kernels.head_fwd(rows, torch.zeros(shape[0], 16), one, pairs, pairs)
        cpu_kernels.head_bwd(rows, torch.zeros(shape[0], 16), one, pairs, pairs, pairs, rows)
        cpu_kernels.gather_rows(rows, no_index, torch.zeros(shape[0], 0, 16))
        cpu_kernels.add_rows(torch.zeros(shape[0], 0, 16), no_index, rows)
    d_vectors = torch.full((4, 16), torch.nan)  # a sum over no images is zero
    cpu_kernels.assemble_prompts_bwd(torch.zeros(0, 4, 16), d_vectors, torch.zeros(0, 16))
    assert not d_vectors.any()
    assert math.isnan(cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


def test_same_bits_for_any_number_of_threads(isa, threads):
    n, d = 300, 512
    x, gamma, beta, bias, dy = (
        torch.randn(n, d),
        torch.randn(d),
        torch.randn(d),
        torch.randn(d),
        torch.randn(n, d),
    )

    def results():
        rows, y, mean, rstd, dx = x.clone(), torch.empty(n, d), torch.empty(n), torch.empty(n), dy.clone()
        cpu_kernels.layer_norm_fwd(rows, bias, dy, gamma, beta, EPS, y, mean, rstd)
        cpu_kernels.layer_norm_bwd(dy, rows, gamma, mean, rstd, dx, accumulate=True)
        out, dg = torch.empty(n, d), dy.clone()
        cpu_kernels.activation_fwd(x, "gelu", out)
        cpu_kernels.activation_bwd(x, "quick_gelu", dg)
        d_vectors, d_shift = torch.empty(100, d), torch.empty(3, d)
        cpu_kernels.assemble_prompts_bwd(x.view(3, 100, d), d_vectors, d_shift)
        logits, norms = torch.empty(3, 100), torch.empty(3, 100)
        cpu_kernels.head_fwd(x.view(3, 100, d), dy[:3], torch.tensor([4.6]), logits, norms)
        loss = torch.empty(1)
        cpu_kernels.cross_entropy_fwd(logits, torch.tensor([0, 99, 5]), loss)
        return [rows, y, mean, rstd, dx, out, dg, d_vectors, d_shift, logits, norms, loss]

    threads(1)
    first = results()
    for count in [1, 2, 3] * 4:
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True)), f"{count} threads"


def test_isa_is_chosen_by_name(widest_isa):
    available = cpu_kernels.available_isas()
    assert available[0] == "portable"
    extension = CPP.load()
    for name in available:
        cpu_kernels.set_isa(name)
        assert extension.isa() == name
    with pytest.raises(ValueError, match=r"`isa` must be one of portable.* on this machine, got 'mmx'"):
        cpu_kernels.set_isa("mmx")
