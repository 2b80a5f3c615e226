"""Gathering rows, and adding to rows, in Triton against indexing in torch."""

import pytest
import torch
from comparison import assert_close

move_rows = pytest.importorskip("cocoop_fast.kernels.move_rows")


# One block of columns, part of one, more than one.
@pytest.mark.parametrize("batch, rows, d", [(1, 9, 512), (3, 5, 33), (2, 4, 1), (2, 3, 640)])
def test_move_rows(buffers, dtype, batch, rows, d):
    x = buffers.randn(batch, rows, d, dtype=dtype)
    index = buffers.copy(torch.randperm(rows, generator=buffers.generator)[: rows - 2])
    out = buffers.result(batch, len(index), d, dtype=dtype)
    move_rows.gather_rows(x, index, out)
    assert torch.equal(out, x[:, index])
    moved = buffers.randn(batch, len(index), d, dtype=dtype)
    expected, target = x.clone(), buffers.copy(x)
    expected[:, index] = expected[:, index] + moved
    move_rows.add_rows(moved, index, target)
    if dtype == torch.bfloat16:  # the interpreter truncates where a GPU rounds
        assert_close(target, expected, 2**-7)
    else:
        assert torch.equal(target, expected)


@pytest.mark.parametrize("batch, rows, strides", [(3, 4, (2**30, 16)), (1, 10, (2**32, 2**28))])
def test_rows_further_apart_than_32_bits_count(device, batch, rows, strides):
    """Each stride fits in 32 bits; the offset of the last image, or of the last row, does not. All kernels on rows find
    them in the same way."""
    near = torch.randn(batch, rows, 8, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    # Memory that is not touched is never there.
    far = torch.empty_strided(near.shape, (*strides, 1), dtype=torch.float16, device=device)
    far.copy_(near)
    index, out = torch.arange(rows, device=device), torch.empty_like(near)
    move_rows.gather_rows(far, index, out)
    assert torch.equal(out, near)
    move_rows.add_rows(near, index, far)
    assert torch.equal(far, 2 * near)


def test_no_rows(device):
    x, index = torch.zeros(2, 4, 16, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    move_rows.gather_rows(x, index, x[:, :0])
    move_rows.add_rows(x[:, :0], index, x)


def test_bad_arguments(device):
    x, out = torch.zeros(1, 4, 8, device=device), torch.zeros(1, 2, 8, device=device)
    index = torch.tensor([0, 1, 2], device=device)
    with pytest.raises(ValueError, match=r"`out` \(B, n, d\) with n = 3, got \(1, 4, 8\) and \(1, 2, 8\)"):
        move_rows.gather_rows(x, index, out)
    with pytest.raises(ValueError, match=r"`out` must have shape \(B, R, d\) and `x` \(B, n, d\) with n = 3"):
        move_rows.add_rows(out, index, x)
    with pytest.raises(ValueError, match=r"`index` must be torch.int64, got torch.int32"):
        move_rows.gather_rows(x, index.int(), out)
