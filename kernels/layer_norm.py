"""LayerNorm over rows, with the addition of a bias and a residual before it, and its input gradient.

One program owns one row, held in registers: forward reads the row once and takes the variance of the centred row.
Memory traffic a row of d numbers of s bytes: forward 2 d s (x in, y out), with bias and residual 4 d s (residual in, x
out as well); backward 3 d s, with accumulation 4 d s (dy, x, dx in; dx out). gamma, beta and the bias stay in the
caches; the statistics are 8 bytes a row. Both are bound by memory: sixteen numbers a thread and one to four warps a row
leave room for 32 rows on a multiprocessor, about 32 KB in flight in fp16. Predicted: 80 to 90 % of the memory's
bandwidth from some ten thousand rows on, and below a thousand rows the time of a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import ROW_BLOCKS, check_array, row_block, row_layout, row_offset
from .variants import STORAGE, Variant


@triton.jit
def normalise(value, gamma, beta, columns, inside, width, eps):
    """(value - mean) rstd gamma + beta of one row, its mean and rstd; all in fp32, `value` zero outside."""
    mean = tl.sum(value, axis=0) / width
    centred = tl.where(inside, value - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    weight = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(beta + columns, mask=inside, other=0.0).to(tl.float32)
    return centred * rstd * weight + shift, mean, rstd


@triton.jit(do_not_specialize=["per_image"])
def _layer_norm_fwd_kernel(
    x,
    bias,
    residual,
    gamma,
    beta,
    y,
    mean,
    rstd,
    per_image,
    width,
    stride_xb,
    stride_xr,
    stride_yb,
    stride_yr,
    stride_rb,
    stride_rr,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x += row_offset(row, per_image, stride_xb, stride_xr)
    y += row_offset(row, per_image, stride_yb, stride_yr)
    value = tl.load(x + columns, mask=inside, other=0.0)
    if ADD:
        residual += row_offset(row, per_image, stride_rb, stride_rr)
        total = value.to(tl.float32) + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
        # Rounded before it is normalised: the statistics are those of the row that backward reads.
        value = total.to(value.dtype)
        tl.store(x + columns, value, mask=inside)
    normed, row_mean, row_rstd = normalise(value.to(tl.float32), gamma, beta, columns, inside, width, eps)
    tl.store(y + columns, normed, mask=inside)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


def layer_norm_fwd(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """x += bias + residual, y = LN(x), in one pass over the rows.

    Args:
        x: rows (n, d) or (B, n/B, d), d <= 2048; changed in place if there is a bias.
        bias: (d,), or None.
        residual: rows in the dtype of `x`; None where the bias is.
        gamma, beta: (d,).
        eps: LayerNorm's epsilon.
        y: rows, written.
        mean, rstd: (n,) fp32, written.
    """
    if (bias is None) != (residual is None):
        raise ValueError("`residual` must be None exactly if `bias` is")
    rows = row_layout(x=x, y=y, residual=x if residual is None else residual)
    if bias is not None:
        check_array("bias", bias, (rows.width,), x)
    check_array("gamma", gamma, (rows.width,), x)
    check_array("beta", beta, (rows.width,), x)
    check_array("mean", mean, (rows.count,), x, torch.float32)
    check_array("rstd", rstd, (rows.count,), x, torch.float32)
    if not rows.count:
        return
    block, warps = row_block(rows.width)
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(rows.count,)](
            x, x if bias is None else bias, x if residual is None else residual,
            gamma, beta, y, mean, rstd, rows.per_image, rows.width, *rows.strides, eps,
            ADD=bias is not None, BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["per_image"])
def _layer_norm_bwd_kernel(
    dy,
    x,
    gamma,
    mean,
    rstd,
    dx,
    per_image,
    width,
    stride_dyb,
    stride_dyr,
    stride_xb,
    stride_xr,
    stride_dxb,
    stride_dxr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    dy += row_offset(row, per_image, stride_dyb, stride_dyr)
    x += row_offset(row, per_image, stride_xb, stride_xr)
    dx += row_offset(row, per_image, stride_dxb, stride_dxr)
    row_rstd = tl.load(rstd + row)
    # Outside, other=0 makes g zero, and with it every term of both sums.
    weight = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + columns, mask=inside, other=0.0).to(tl.float32) * weight
    value = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (value - tl.load(mean + row)) * row_rstd
    mean_g = tl.sum(g, axis=0) / width
    mean_g_normed = tl.sum(g * normed, axis=0) / width
    gradient = row_rstd * (g - mean_g - normed * mean_g_normed)
    if ACCUMULATE:
        gradient += tl.load(dx + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + columns, gradient, mask=inside)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    *,
    accumulate: bool,
) -> None:
    """dx += rstd (g - mean(g) - xhat mean(g xhat)), g = dy gamma, xhat = (x - mean) rstd.

    Args:
        dy, x: rows (n, d) or (B, n/B, d), d <= 2048; x as :func:`layer_norm_fwd` left it.
        gamma: (d,).
        mean, rstd: (n,) fp32, of the forward.
        dx: rows, added to; written if not `accumulate`. May be `dy` if not `accumulate`.
    """
    rows = row_layout(dy=dy, x=x, dx=dx)
    check_array("gamma", gamma, (rows.width,), x)
    check_array("mean", mean, (rows.count,), x, torch.float32)
    check_array("rstd", rstd, (rows.count,), x, torch.float32)
    if not rows.count:
        return
    block, warps = row_block(rows.width)
    with torch.cuda.device_of(x):
        _layer_norm_bwd_kernel[(rows.count,)](
            dy, x, gamma, mean, rstd, dx, rows.per_image, rows.width, *rows.strides,
            ACCUMULATE=accumulate, BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip


def _variants() -> tuple[Variant, ...]:
    """Rows of each type with weights of the same, and half-precision rows with the fp32 LayerNorms of OpenAI's CLIP."""
    found = []
    for dtype in STORAGE:
        for weights in dict.fromkeys((dtype, "fp32")):
            r, w, s = f"*{dtype}", f"*{weights}", "*fp32"
            sizes = {"per_image": "i32", "width": "i32"}
            forward = dict.fromkeys(("x", "bias", "residual", "y"), r)
            forward |= {"gamma": w, "beta": w, "mean": s, "rstd": s}
            strides = ("stride_xb", "stride_xr", "stride_yb", "stride_yr", "stride_rb", "stride_rr")
            forward |= sizes | dict.fromkeys(strides, "i32") | {"eps": "fp32"}
            backward = {"dy": r, "x": r, "gamma": w, "mean": s, "rstd": s, "dx": r, **sizes}
            strides = ("stride_dyb", "stride_dyr", "stride_xb", "stride_xr", "stride_dxb", "stride_dxr")
            backward |= dict.fromkeys(strides, "i32")
            for block, warps in ROW_BLOCKS.items():
                name = f"d<={block}" + (", fp32 weights" if weights != dtype else "")
                for add in (False, True):
                    found.append(
                        Variant(
                            _layer_norm_fwd_kernel, name + ", residual" * add, dtype, forward,
                            {"ADD": add, "BLOCK": block}, warps,
                        )
                    )  # fmt: skip
                for flag in (False, True):
                    found.append(
                        Variant(
                            _layer_norm_bwd_kernel, name + ", accumulate" * flag, dtype, backward,
                            {"ACCUMULATE": flag, "BLOCK": block}, warps,
                        )
                    )  # fmt: skip
    return tuple(found)


VARIANTS = _variants()
