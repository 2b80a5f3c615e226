"""From context vectors and their shift to the context rows of layer 0, normalised, and to dense prompts.

`assemble_prompts`: one program owns one context row. It adds vector, shift and position, writes the row and its
LayerNorm: 2 d s bytes a row of d numbers of s bytes, as the inputs, read by many rows, come from the caches. With
B M rows in all it costs a launch. Its gradient: one program owns 256 columns of one sum, over the images or over the
context vectors, in ascending order; every row is read twice, 2 d s bytes.

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
    vectors,
    shift,
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
    SHARED: tl.constexpr,
    OF_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    image, token = (row // m).to(tl.int64), (row % m).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x += image * stride_xb + token * stride_xm
    y += image * stride_yb + token * stride_ym
    shift += (row.to(tl.int64) if OF_ROW else image) * width
    value = tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    if SHARED:
        value += tl.load(vectors + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(position + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded before it is normalised: the statistics are those of the row that backward reads.
    value = value.to(x.dtype.element_ty)
    tl.store(x + columns, value, mask=inside)
    normed, row_mean, row_rstd = normalise(value.to(tl.float32), gamma, beta, columns, inside, width, eps)
    tl.store(y + columns, normed, mask=inside)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


def assemble_prompts_fwd(
    vectors: Tensor | None,
    shift: Tensor,
    position: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """x[b, m] = vectors[m] + shift[b, m] + position[m], y = LN(x), in one pass.

    Args:
        vectors: (M, d), d <= 2048; or None.
        shift: (B, d), the same for all of an image, or (B, M, d).
        position: (M, d).
        gamma, beta: (d,).
        eps: LayerNorm's epsilon.
        x, y: rows (B, M, d), written. `vectors` and the others may be wider types: the sum is in fp32.
        mean, rstd: (B * M,) fp32, written.
    """
    rows = row_layout(x=x, y=y)
    m, d = rows.per_image, rows.width
    of_row = _check_shift("shift", shift, _images("x", x), m, x)
    if vectors is not None:
        check_array("vectors", vectors, (m, d), x)
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
            shift if vectors is None else vectors, shift, position, gamma, beta, x, y, mean, rstd,
            m, d, *rows.strides, eps,
            SHARED=vectors is not None, OF_ROW=of_row, BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "m", "shared"])
def _assemble_prompts_bwd_kernel(
    dx,
    d_vectors,
    d_shift,
    batch,
    m,
    shared,
    width,
    stride_xb,
    stride_xm,
    OF_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The first `shared` programs, M or none, each sum a context vector over the images. The others sum an image over
    # its context vectors, or with OF_ROW copy one of its rows.
    row = tl.program_id(0)
    of_vectors = row < shared
    rest = row - shared
    if OF_ROW:
        first = (rest // m).to(tl.int64) * stride_xb + (rest % m).to(tl.int64) * stride_xm
        count = tl.where(of_vectors, batch, 1)
    else:
        first = rest.to(tl.int64) * stride_xb
        count = tl.where(of_vectors, batch, m)
    first = tl.where(of_vectors, row.to(tl.int64) * stride_xm, first)
    step = tl.where(of_vectors, stride_xb, stride_xm).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, count):
        total += tl.load(dx + first + i * step + columns, mask=inside, other=0.0).to(tl.float32)
    if of_vectors:
        tl.store(d_vectors + row.to(tl.int64) * width + columns, total, mask=inside)
    else:
        tl.store(d_shift + rest.to(tl.int64) * width + columns, total, mask=inside)


def assemble_prompts_bwd(dx: Tensor, d_vectors: Tensor | None, d_shift: Tensor) -> None:
    """d_vectors[m] = sum_b dx[b, m]; d_shift[b] = sum_m dx[b, m], or d_shift = dx. Sums in ascending order.

    Args:
        dx: rows (B, M, d).
        d_vectors: (M, d), written; or None.
        d_shift: (B, d) or (B, M, d), written.
    """
    rows = row_layout(dx=dx)
    batch, m, d = _images("dx", dx), rows.per_image, rows.width
    of_row = _check_shift("d_shift", d_shift, batch, m, dx)
    if d_vectors is not None:
        check_array("d_vectors", d_vectors, (m, d), dx)
    shared = 0 if d_vectors is None else m
    programs = shared + (batch * m if of_row else batch)
    if not programs * d:
        return
    with torch.cuda.device_of(dx):
        _assemble_prompts_bwd_kernel[(programs, triton.cdiv(d, SUM_BLOCK))](
            dx, d_shift if d_vectors is None else d_vectors, d_shift, batch, m, shared, d, *rows.strides,
            OF_ROW=of_row, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS, num_stages=1,
        )  # fmt: skip


def _check_shift(name: str, shift: Tensor, batch: int, m: int, rows: Tensor) -> bool:
    """Whether a shift has a row of its own for each context vector of an image."""
    width = rows.shape[-1]
    check_array(name, shift, (batch, m, width) if shift.ndim == 3 else (batch, width), rows)
    return shift.ndim == 3


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
    """Rows of each type with contexts and weights of the same; half-precision rows with fp32 contexts, as they are where
    fp32 master copies are learned, and weights of either."""
    found = []
    for dtype in STORAGE:
        r, s = f"*{dtype}", "*fp32"
        for contexts, weights in dict.fromkeys(((dtype, dtype), ("fp32", dtype), ("fp32", "fp32"))):
            c = f"*{contexts}"
            suffix = ", fp32 contexts" if contexts != dtype else ""
            strides = ("stride_xb", "stride_xm", "stride_yb", "stride_ym")
            forward = {"vectors": c, "shift": c} | dict.fromkeys(("position", "gamma", "beta"), f"*{weights}")
            forward |= {"x": r, "y": r, "mean": s, "rstd": s}
            forward |= dict.fromkeys(("m", "width", *strides), "i32") | {"eps": "fp32"}
            backward = {"dx": r, "d_vectors": c, "d_shift": c}
            backward |= dict.fromkeys(("batch", "m", "shared", "width", *strides[:2]), "i32")
            # A shift of each image with shared vectors, or of each row with and without them.
            forms = {"": (True, False), "rows": (True, True), "rows alone": (False, True)}
            for form, (shared, of_row) in forms.items():
                for block, warps in ROW_BLOCKS.items():
                    name = ", ".join(filter(None, (f"d<={block}", form))) + suffix
                    name += " and weights" if weights != dtype else ""
                    constexprs = {"SHARED": shared, "OF_ROW": of_row, "BLOCK": block}
                    found.append(
                        Variant(_assemble_prompts_fwd_kernel, name, dtype, forward, constexprs, warps)
                    )
                if (
                    shared and weights == dtype
                ):  # without vectors it is the same kernel, and it reads no weights
                    constexprs = {"OF_ROW": of_row, "BLOCK": SUM_BLOCK}
                    name = (form + suffix).removeprefix(", ")
                    found.append(
                        Variant(_assemble_prompts_bwd_kernel, name, dtype, backward, constexprs, SUM_WARPS)
                    )
        dense = dict.fromkeys(("context", "prefix", "suffix", "out"), r)
        dense |= dict.fromkeys(("rows", "classes", "m", "length", "width"), "i32")
        constexprs = {"ROWS": COPY_ROWS, "BLOCK": COPY_BLOCK}
        found.append(Variant(_assemble_dense_kernel, "", dtype, dense, constexprs, COPY_WARPS))
    return tuple(found)


VARIANTS = _variants()
