"""From context vectors and Meta-Net biases to the context rows of layer 0, normalised, and to dense prompts.

`assemble_prompts`: one program owns one context row. It adds context, bias and position, writes the row and its
LayerNorm: 2 d s bytes a row of d numbers of s bytes, as the inputs, read by many rows, come from the caches. With
B M rows in all it costs a launch. Its gradient: one program owns 256 columns of one sum, over the images or over the
context tokens, in ascending order; every row is read twice, 2 d s bytes.

`assemble_dense`: one program copies 512 columns of four consecutive rows of the result, each from where it comes from;
the (B, K, L, d) prompts are written once and nothing else is of that size: d s bytes a row out, and of the sources,
which all images share, B times less in where they do not stay in the caches. Predicted: 85 to 90 % of the memory's
bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layer_norm import normalise
from .rows import ROW_BLOCKS, check_array, row_block, row_layout
from .variants import STORAGE, Variant

SUM_BLOCK, SUM_WARPS = 256, 1
COPY_BLOCK, COPY_ROWS, COPY_WARPS = 512, 4, 1


@triton.jit(do_not_specialize=["m"])
def _assemble_prompts_fwd_kernel(
    ctx,
    bias,
    position,
    gamma,
    beta,
    x,
    y,
    mean,
    rstd,
    m,
    width,
    stride_xb,
    stride_xm,
    stride_yb,
    stride_ym,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    image, token = (row // m).to(tl.int64), (row % m).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x += image * stride_xb + token * stride_xm
    y += image * stride_yb + token * stride_ym
    value = tl.load(ctx + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + image * width + columns, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(position + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded before it is normalised: the statistics are those of the row that backward reads.
    value = value.to(x.dtype.element_ty)
    tl.store(x + columns, value, mask=inside)
    normed, row_mean, row_rstd = normalise(value.to(tl.float32), gamma, beta, columns, inside, width, eps)
    tl.store(y + columns, normed, mask=inside)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


def assemble_prompts_fwd(
    ctx: Tensor,
    bias: Tensor,
    position: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """x[b, m] = ctx[m] + bias[b] + position[m], y = LN(x), in one pass.

    Args:
        ctx, position: (M, d), d <= 2048.
        bias: (B, d).
        gamma, beta: (d,).
        x, y: rows (B, M, d), written. `ctx` and the others may be wider types: the sum is in fp32.
        mean, rstd: (B * M,) fp32, written.
    """
    rows = row_layout(x=x, y=y)
    m, d = rows.per_image, rows.width
    batch = _images("x", x)
    check_array("ctx", ctx, (m, d), x)
    check_array("bias", bias, (batch, d), x)
    check_array("position", position, (m, d), x)
    check_array("gamma", gamma, (d,), x)
    check_array("beta", beta, (d,), x)
    check_array("mean", mean, (rows.count,), x, torch.float32)
    check_array("rstd", rstd, (rows.count,), x, torch.float32)
    if not rows.count:
        return
    block, warps = row_block(d)
    with torch.cuda.device_of(x):
        _assemble_prompts_fwd_kernel[(rows.count,)](
            ctx, bias, position, gamma, beta, x, y, mean, rstd, m, d, *rows.strides, eps,
            BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "m"])
def _assemble_prompts_bwd_kernel(
    dx, d_ctx, d_bias, batch, m, width, stride_xb, stride_xm, BLOCK: tl.constexpr
):
    # Program 0 .. M - 1 sums its context token over the images, the others their image over the tokens.
    row = tl.program_id(0)
    of_token = row < m
    image = row - m
    first = tl.where(of_token, row.to(tl.int64) * stride_xm, image.to(tl.int64) * stride_xb)
    step = tl.where(of_token, stride_xb, stride_xm).to(tl.int64)
    count = tl.where(of_token, batch, m)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, count):
        total += tl.load(dx + first + i * step + columns, mask=inside, other=0.0).to(tl.float32)
    if of_token:
        tl.store(d_ctx + row.to(tl.int64) * width + columns, total, mask=inside)
    else:
        tl.store(d_bias + image.to(tl.int64) * width + columns, total, mask=inside)


def assemble_prompts_bwd(dx: Tensor, d_ctx: Tensor, d_bias: Tensor) -> None:
    """d_ctx[m] = sum_b dx[b, m], d_bias[b] = sum_m dx[b, m], in ascending order.

    Args:
        dx: rows (B, M, d).
        d_ctx: (M, d), written.
        d_bias: (B, d), written.
    """
    rows = row_layout(dx=dx)
    batch, m, d = _images("dx", dx), rows.per_image, rows.width
    check_array("d_ctx", d_ctx, (m, d), dx)
    check_array("d_bias", d_bias, (batch, d), dx)
    if not (batch + m) * d:
        return
    with torch.cuda.device_of(dx):
        _assemble_prompts_bwd_kernel[(m + batch, triton.cdiv(d, SUM_BLOCK))](
            dx, d_ctx, d_bias, batch, m, d, *rows.strides,
            BLOCK=SUM_BLOCK, num_warps=SUM_WARPS, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "classes", "m", "length"])
def _assemble_dense_kernel(
    context, prefix, suffix, out, rows, classes, m, length, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(ROWS):
        row = tl.program_id(0) * ROWS + i
        prompt, token = row // length, row % length
        image, label = (prompt // classes).to(tl.int64), (prompt % classes).to(tl.int64)
        from_context = context + (image * m + token - 1) * width
        from_suffix = suffix + (label * (length - 1 - m) + token - 1 - m) * width
        source = tl.where(token <= m, from_context, from_suffix)
        source = tl.where(token == 0, prefix + label * width, source)
        inside = columns < tl.where(row < rows, width, 0)
        tl.store(
            out + row.to(tl.int64) * width + columns, tl.load(source + columns, mask=inside), mask=inside
        )


def assemble_dense(context: Tensor, prefix: Tensor, suffix: Tensor, out: Tensor) -> None:
    """out[b, k] = prefix[k], context[b], suffix[k].

    Args:
        context: (B, M, d).
        prefix: (K, d).
        suffix: (K, L - 1 - M, d).
        out: (B, K, L, d) in the dtype of the three, written.
    """
    if out.ndim != 4 or context.ndim != 3 or out.shape[2] < 1 + context.shape[1]:
        raise ValueError(
            "`out` must have shape (B, K, L, d) with L > M and `context` (B, M, d), "
            f"got {tuple(out.shape)} and {tuple(context.shape)}"
        )
    batch, classes, length, d = out.shape
    m = context.shape[1]
    check_array("out", out, (batch, classes, length, d), out)
    check_array("context", context, (batch, m, d), out, out.dtype)
    check_array("prefix", prefix, (classes, d), out, out.dtype)
    check_array("suffix", suffix, (classes, length - 1 - m, d), out, out.dtype)
    if not out.numel():
        return
    rows = batch * classes * length
    with torch.cuda.device_of(out):
        _assemble_dense_kernel[(triton.cdiv(rows, COPY_ROWS), triton.cdiv(d, COPY_BLOCK))](
            context, prefix, suffix, out, rows, classes, m, length, d,
            ROWS=COPY_ROWS, BLOCK=COPY_BLOCK, num_warps=COPY_WARPS, num_stages=1,
        )  # fmt: skip


def _images(name: str, rows: Tensor) -> int:
    """B of rows (B, M, d)."""
    if rows.ndim != 3:
        raise ValueError(f"`{name}` must have shape (B, M, d), got {tuple(rows.shape)}")
    return rows.shape[0]


def _variants() -> tuple[Variant, ...]:
    """Rows of each type with parameters of the same, and half-precision rows with fp32 ones."""
    found = []
    for dtype in STORAGE:
        r, s = f"*{dtype}", "*fp32"
        for parameters in dict.fromkeys((dtype, "fp32")):
            p = f"*{parameters}"
            suffix = ", fp32 parameters" if parameters != dtype else ""
            strides = ("stride_xb", "stride_xm", "stride_yb", "stride_ym")
            forward = dict.fromkeys(("ctx", "bias", "position", "gamma", "beta"), p)
            forward |= {"x": r, "y": r, "mean": s, "rstd": s}
            forward |= dict.fromkeys(("m", "width", *strides), "i32") | {"eps": "fp32"}
            for block, warps in ROW_BLOCKS.items():
                constexprs = {"BLOCK": block}
                found.append(
                    Variant(
                        _assemble_prompts_fwd_kernel, f"d<={block}{suffix}", dtype, forward, constexprs, warps
                    )
                )
            backward = {"dx": r, "d_ctx": p, "d_bias": p}
            backward |= dict.fromkeys(("batch", "m", "width", *strides[:2]), "i32")
            constexprs = {"BLOCK": SUM_BLOCK}
            found.append(
                Variant(_assemble_prompts_bwd_kernel, suffix[2:], dtype, backward, constexprs, SUM_WARPS)
            )
        dense = dict.fromkeys(("context", "prefix", "suffix", "out"), r)
        dense |= dict.fromkeys(("rows", "classes", "m", "length", "width"), "i32")
        constexprs = {"ROWS": COPY_ROWS, "BLOCK": COPY_BLOCK}
        found.append(Variant(_assemble_dense_kernel, "", dtype, dense, constexprs, COPY_WARPS))
    return tuple(found)


VARIANTS = _variants()
