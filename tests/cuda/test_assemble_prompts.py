"""The CUDA prompt assembly, emulated, against its torch twins in float64."""

import pytest
import torch
from attention_cases import TOLERANCES, Fenced
from comparison import assert_close
from kernel_testing import POISON

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops.assemble_prompts import assemble_context_ref, assemble_dense_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def result(*shape, dtype=torch.float32):
    return Fenced(*shape, dtype=dtype, device="cpu", poison=POISON)


def aligned(*shape, dtype):
    fenced = Fenced(*shape, dtype=dtype, device="cpu", poison=torch.nan)
    fenced.tensor.copy_(torch.randn(*shape))
    return fenced.tensor


def apart(tensor):
    """A copy that begins where a vector of numbers cannot be loaded."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("masters", [False, True], ids=["", "fp32-masters"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, m, d",
    [
        (1, 4, 512),  # a thread has four numbers
        (2, 2, 768),  # or eight, some of them
        (3, 1, 33),  # or single ones
    ],
)
@pytest.mark.parametrize("form", ["image", "row", "row alone"])
def test_assemble_prompts(cuda, batch, m, d, form, dtype, masters):
    """A shift of each image, of each of its rows, and whole contexts that share no vectors."""
    own = torch.float32 if masters else dtype
    vectors, position = (
        None if form == "row alone" else torch.randn(m, d).to(own),
        torch.randn(m, d).to(dtype),
    )
    shift = (torch.randn(batch, d) if form == "image" else torch.randn(batch, m, d)).to(own)
    gamma, beta = torch.randn(2, d).to(own)
    x, y = result(batch, m, d, dtype=dtype), result(batch, m, d, dtype=dtype)
    mean, rstd = result(batch * m), result(batch * m)
    cuda.assemble_prompts_fwd(
        vectors, shift, position, gamma, beta, EPS, x.tensor, y.tensor, mean.tensor, rstd.tensor
    )
    for written in (x, y, mean, rstd):
        written.check()
    shared = torch.zeros(m, d) if vectors is None else vectors
    rows = assemble_context_ref(shared.double(), shift.double()) + position
    assert_close(x.tensor, rows, TOLERANCES[dtype], "x")
    stored = x.tensor.double()  # the statistics are those of the row that backward reads
    expected = layer_norm_ref(stored, Affine(gamma.double(), beta.double(), EPS))
    assert_close(y.tensor, expected, TOLERANCES[dtype], "y")
    assert_close(mean.tensor, stored.mean(-1).flatten(), 1e-5, "mean")
    assert_close(rstd.tensor, (stored.var(-1, correction=0).flatten() + EPS).rsqrt(), 1e-5, "rstd")

    dx = aligned(batch, m, d, dtype=dtype)
    d_vectors = None if vectors is None else torch.full((m, d), torch.nan, dtype=own)
    d_shift = torch.full_like(shift, torch.nan)
    cuda.assemble_prompts_bwd(dx, d_vectors, d_shift)
    if d_vectors is not None:
        assert_close(d_vectors, dx.double().sum(0), TOLERANCES[own], "d_vectors")
    if form == "image":
        assert_close(d_shift, dx.double().sum(1), TOLERANCES[own], "d_shift")
    else:
        assert torch.equal(d_shift, dx.to(own))


def test_addresses_choose_no_other_result(cuda):
    """Single numbers at a time where four cannot be loaded: the sums of a row then have another order."""
    vectors, shift, position = torch.randn(2, 40), torch.randn(3, 40), torch.randn(2, 40)
    gamma, beta = torch.randn(2, 40)
    outcomes = []
    for given in (vectors, apart(vectors)):
        x, y, mean, rstd = torch.empty(3, 2, 40), torch.empty(3, 2, 40), torch.empty(6), torch.empty(6)
        cuda.assemble_prompts_fwd(given, shift, position, gamma, beta, EPS, x, y, mean, rstd)
        outcomes.append((x, y, mean, rstd))
    for once, again in zip(*outcomes, strict=True):
        assert_close(again, once, 1e-6)


def test_sums_are_in_ascending_order(cuda):
    dx = torch.randn(7, 3, 40)
    d_vectors, d_shift = torch.empty(3, 40), torch.empty(7, 40)
    cuda.assemble_prompts_bwd(dx, d_vectors, d_shift)
    for total, terms in ((d_vectors, dx.unbind(0)), (d_shift, dx.unbind(1))):
        expected = torch.zeros_like(total)
        for term in terms:
            expected += term
        assert torch.equal(total, expected)


def test_rows_far_from_zero(cuda):
    """The variance is that of the centred row: E[x^2] - E[x]^2 would lose every digit here."""
    ctx, zero = torch.randn(1, 512) + 1e4, torch.zeros(1, 512)
    x, y, mean, rstd = torch.empty(1, 1, 512), torch.empty(1, 1, 512), torch.empty(1), torch.empty(1)
    cuda.assemble_prompts_fwd(ctx, zero, zero, torch.ones(512), zero[0], EPS, x, y, mean, rstd)
    expected = torch.nn.functional.layer_norm(x.double(), (512,), eps=EPS)
    assert float((y - expected).abs().max()) < 1e4 * torch.finfo(torch.float32).eps * 4  # that of the mean


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, k, m, length, d",
    [
        (2, 3, 4, 9, 64),  # sixteen bytes at a time
        (2, 3, 1, 5, 33),  # two, or four in float32
        (1, 1, 2, 3, 8),  # no suffix
        (0, 3, 4, 9, 8),
        (2, 0, 1, 4, 8),
    ],
)
def test_assemble_dense(cuda, batch, k, m, length, d, dtype):
    context, prefix = torch.randn(batch, m, d).to(dtype), torch.randn(k, d).to(dtype)
    suffix = torch.randn(k, length - 1 - m, d).to(dtype)
    expected = assemble_dense_ref(context, prefix, suffix)
    for given in (context, apart(context)):
        out = torch.full((batch, k, length, d), torch.nan, dtype=dtype)
        cuda.assemble_dense(given, prefix, suffix, out)
        assert torch.equal(out, expected)


def test_no_images(cuda):
    """A sum over no images is zero."""
    d_ctx, none = torch.full((4, 16), torch.nan), torch.zeros(0, 4, 16)
    cuda.assemble_prompts_bwd(none, d_ctx, none[:, 0])
    assert not d_ctx.any()
    one, flat = torch.ones(16), none.view(-1)
    cuda.assemble_prompts_fwd(d_ctx, none[:, 0], d_ctx, one, one, EPS, none, none, flat, flat)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vectors": torch.zeros(3, 8)}, r"`vectors` must be contiguous of shape \(2, 8\), got \(3, 8\)"),
        (
            {"vectors": torch.zeros(2, 8).double()},
            "`vectors` must be torch.float16 or torch.bfloat16 or torch.float32, got torch.float64",
        ),
        ({"shift": torch.zeros(3, 16)[:, ::2]}, "`shift` must be contiguous"),
        ({"shift": torch.zeros(3, 1, 8)}, r"`shift` must be contiguous of shape \(3, 2, 8\)"),
        ({"gamma": torch.zeros(7)}, r"`gamma` must be contiguous of shape \(8,\)"),
        ({"beta": torch.zeros(8, 1)}, r"`beta` must be contiguous of shape \(8,\)"),
        ({"x": torch.zeros(3, 8)}, r"`x` must have shape \(B, M, d\)"),
        ({"x": torch.zeros(3, 2, 8).double()}, "take float16, bfloat16 and float32 tensors"),
        ({"x": torch.zeros(3, 2, 9999)}, "`x` must have rows of at most 8192 numbers, got 9999"),
        ({"x": torch.zeros(3, 1, 8).expand(-1, 2, -1)}, "`x` must have rows that do not overlap"),
        ({"y": torch.zeros(3, 2, 16)[..., ::2]}, "`y` must be contiguous in its last dimension"),
        ({"y": torch.zeros(3, 2, 8).half()}, "`y` must be torch.float32 on cpu, got torch.float16"),
        ({"mean": torch.zeros(6).half()}, "`mean` must be torch.float32"),
        ({"rstd": torch.zeros(5)}, r"`rstd` must be contiguous of shape \(6,\)"),
        ({"eps": -1.0}, "`eps` must not be negative"),
        ({"eps": float("nan")}, "`eps` must not be negative"),
    ],
)
def test_bad_arguments(cuda, change, message):
    names = ("vectors", "shift", "position", "gamma", "beta", "eps", "x", "y", "mean", "rstd")
    shapes = ((2, 8), (3, 8), (2, 8), (8,), (8,), EPS, (3, 2, 8), (3, 2, 8), (6,), (6,))
    good = {
        name: torch.zeros(s) if isinstance(s, tuple) else s for name, s in zip(names, shapes, strict=True)
    }
    cuda.assemble_prompts_fwd(**good)
    with pytest.raises(ValueError, match=message):
        cuda.assemble_prompts_fwd(**{**good, **change})


def test_bad_dense_arguments(cuda):
    context, prefix, suffix, out = (torch.zeros(s) for s in ((2, 3, 8), (4, 8), (4, 5, 8), (2, 4, 9, 8)))
    cuda.assemble_dense(context, prefix, suffix, out)
    for arguments, message in [
        ((context, prefix[1:], suffix, out), r"`prefix` must be contiguous of shape \(4, 8\)"),
        ((context, prefix, suffix.half(), out), "`suffix` must be torch.float32"),
        ((context, prefix, suffix, out[:, :, 1:]), r"`out` must be contiguous of shape \(2, 4, 9, 8\)"),
        ((context[0], prefix, suffix, out), r"`context` must have shape \(B, M, d\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            cuda.assemble_dense(*arguments)
