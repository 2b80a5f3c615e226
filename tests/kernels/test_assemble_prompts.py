"""Prompt assembly in Triton against its torch twins in float64."""

import pytest
import torch
from comparison import assert_close

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops.assemble_prompts import assemble_context_ref, assemble_dense_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref

assemble = pytest.importorskip("cocoop_fast.kernels.assemble_prompts")

EPS = 1e-5


@pytest.mark.parametrize("fp32_parameters", [False, True], ids=["", "fp32-parameters"])
@pytest.mark.parametrize("form", ["image", "row", "row alone"])
@pytest.mark.parametrize("batch, m, d", [(1, 4, 512), (3, 1, 33), (2, 5, 20), (2, 2, 768), (1, 1, 1280)])
def test_assemble_prompts(buffers, dtype, tolerance, batch, m, d, form, fp32_parameters):
    """A shift of each image, of each of its rows, and whole contexts that share no vectors."""
    own = torch.float32 if fp32_parameters else dtype
    vectors, position = (buffers.randn(m, d, dtype=own, contiguous=True) for _ in range(2))
    shift_shape = (batch, d) if form == "image" else (batch, m, d)
    shift = buffers.randn(*shift_shape, dtype=own, contiguous=True)
    if form == "row alone":
        vectors = None
    gamma, beta = buffers.randn(d, dtype=own), buffers.randn(d, dtype=own)
    x, y = (buffers.result(batch, m, d, dtype=dtype) for _ in range(2))
    mean, rstd = buffers.result(batch * m), buffers.result(batch * m)
    assemble.assemble_prompts_fwd(vectors, shift, position, gamma, beta, EPS, x, y, mean, rstd)
    shared = torch.zeros_like(position) if vectors is None else vectors
    rows = assemble_context_ref(shared.double(), shift.double()) + position
    assert_close(x, rows, tolerance, "x")
    stored = x.double()  # the statistics are those of the row that backward reads
    assert_close(y, layer_norm_ref(stored, Affine(gamma.double(), beta.double(), EPS)), tolerance, "y")
    assert_close(mean, stored.mean(-1).flatten(), 1e-5, "mean")
    assert_close(rstd, (stored.var(-1, correction=0).flatten() + EPS).rsqrt(), 1e-5, "rstd")

    dx = buffers.randn(batch, m, d, dtype=dtype)
    d_vectors = None if vectors is None else buffers.result(m, d, dtype=own, contiguous=True)
    d_shift = buffers.result(*shift_shape, dtype=own, contiguous=True)
    assemble.assemble_prompts_bwd(dx, d_vectors, d_shift)
    if d_vectors is not None:
        assert_close(d_vectors, dx.double().sum(0), tolerance, "d_vectors")
    if form == "image":
        assert_close(d_shift, dx.double().sum(1), tolerance, "d_shift")
    else:
        assert torch.equal(d_shift, dx.to(own))


def test_sums_are_in_ascending_order(buffers):
    """So they are the same bits on every machine."""
    dx = buffers.randn(7, 3, 40)
    d_vectors, d_shift = buffers.result(3, 40, contiguous=True), buffers.result(7, 40, contiguous=True)
    assemble.assemble_prompts_bwd(dx, d_vectors, d_shift)
    for total, terms in ((d_vectors, dx.unbind(0)), (d_shift, dx.unbind(1))):
        expected = torch.zeros_like(total)
        for term in terms:
            expected += term
        assert torch.equal(total, expected)


@pytest.mark.parametrize(
    "batch, k, m, length, d",
    [(2, 3, 4, 9, 33), (1, 1, 1, 2, 8), (1, 2, 2, 7, 640), (0, 3, 4, 9, 8), (2, 0, 1, 4, 8)],
)
def test_assemble_dense(buffers, dtype, batch, k, m, length, d):
    context = buffers.randn(batch, m, d, dtype=dtype, contiguous=True)
    prefix = buffers.randn(k, d, dtype=dtype, contiguous=True)
    suffix = buffers.randn(k, length - 1 - m, d, dtype=dtype, contiguous=True)
    out = buffers.result(batch, k, length, d, dtype=dtype, contiguous=True)
    assemble.assemble_dense(context, prefix, suffix, out)
    assert torch.equal(out, assemble_dense_ref(context, prefix, suffix))


def test_no_images(device):
    """A sum over no images is zero."""
    d_ctx = torch.full((4, 16), torch.nan, device=device)
    none = torch.zeros(0, 4, 16, device=device)
    assemble.assemble_prompts_bwd(none, d_ctx, none[:, 0])
    assert not d_ctx.any()
    one = torch.ones(16, device=device)
    ctx, flat = d_ctx, none.view(-1)
    assemble.assemble_prompts_fwd(ctx, none[:, 0], ctx, one, one, EPS, none, none, flat, flat)


def test_bad_arguments(device):
    def z(*shape):
        return torch.zeros(*shape, device=device)

    with pytest.raises(ValueError, match=r"`shift` must be contiguous of shape \(1, 2, 8\), got \(1, 3, 8\)"):
        assemble.assemble_prompts_fwd(
            z(2, 8), z(1, 3, 8), z(2, 8), z(8), z(8), EPS, z(1, 2, 8), z(1, 2, 8), z(2), z(2)
        )
    with pytest.raises(ValueError, match=r"`position` must be contiguous of shape \(2, 8\), got \(3, 8\)"):
        assemble.assemble_prompts_fwd(
            z(2, 8), z(1, 8), z(3, 8), z(8), z(8), EPS, z(1, 2, 8), z(1, 2, 8), z(2), z(2)
        )
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, M, d\), got \(2, 8\)"):
        assemble.assemble_prompts_fwd(
            z(2, 8), z(1, 8), z(2, 8), z(8), z(8), EPS, z(2, 8), z(2, 8), z(2), z(2)
        )
    with pytest.raises(ValueError, match=r"`d_shift` must be contiguous of shape \(1, 8\), got \(2, 8\)"):
        assemble.assemble_prompts_bwd(z(1, 2, 8), z(2, 8), z(2, 8))
    with pytest.raises(
        ValueError, match=r"`suffix` must be contiguous of shape \(3, 4, 8\), got \(3, 3, 8\)"
    ):
        assemble.assemble_dense(z(1, 2, 8), z(3, 8), z(3, 3, 8), z(1, 3, 7, 8))
    with pytest.raises(ValueError, match=r"`out` must have shape \(B, K, L, d\) with L > M"):
        assemble.assemble_dense(z(1, 2, 8), z(3, 8), z(3, 0, 8), z(1, 3, 2, 8))
    with pytest.raises(ValueError, match=r"`prefix` must be torch.float32, got torch.float16"):
        assemble.assemble_dense(z(1, 2, 8), z(3, 8).half(), z(3, 1, 8), z(1, 3, 4, 8))
