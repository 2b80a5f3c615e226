"""CoCoOp's Meta-Net, h = W_2 relu(W_1 x + b_1) + b_2, and the unit length of the features that it reads.

`unit_rows`: one program owns an image's feature, in registers: 2 E s bytes of E numbers of s bytes.

`meta_net_fwd`: one program owns an image. It goes over the H = E / 16 hidden units, some at a time, and what they are is
used at once: both matrices are read once an image, mostly from the caches. `meta_net_bwd`: one program owns a hidden unit,
with its row of W_1, its column of W_2 and their gradients, and goes over the images in ascending order, some at a time, so
that nothing is added up across programs; the first one has b_2's gradient besides.

At ViT-B/16 the matrices are 64 KB each in float32, whatever the classes: both kernels take about the time of a launch, some
2 us. As torch's operations it was two for the length, and three launches forward and six backward for the Meta-Net. Predicted:
8 launches of 11 gone, 16 us of a replayed step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import ROW_BLOCKS, check_array, row_block
from .variants import STORAGE, Variant

# A program's columns -> hidden units at a time, images at a time, and warps: of tiles of several rows, more than a row has.
TILES = {512: (8, 4, 4), 1024: (8, 4, 8), 2048: (4, 4, 8)}
WIDEST = max(TILES)


@triton.jit
def _unit_rows_kernel(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    # As torch divides: zeros have no direction, and become NaN.
    tl.store(out + row + columns, value / tl.sqrt(tl.sum(value * value, axis=0)), mask=inside)


def unit_rows(x: Tensor, out: Tensor) -> None:
    """out = x / |x|, row by row.

    Args:
        x: (n, d), d <= 2048.
        out: (n, d) in the dtype of `x`, written; may be `x`.
    """
    if x.ndim != 2:
        raise ValueError(f"`x` must have shape (n, d), got {tuple(x.shape)}")
    check_array("x", x, tuple(x.shape), x)
    check_array("out", out, tuple(x.shape), x, x.dtype)
    rows, width = x.shape
    if not x.numel():
        return
    block, warps = row_block(width)
    with torch.cuda.device_of(x):
        _unit_rows_kernel[(rows,)](x, out, width, BLOCK=block, num_warps=warps, num_stages=1)


@triton.jit(do_not_specialize=["hidden"])
def _meta_net_fwd_kernel(
    x, w1, b1, w2, b2, u, out, hidden, inner, width, BLOCK: tl.constexpr, UNITS: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside, of_x = columns < width, columns < inner
    value = tl.load(x + image * inner + columns, mask=of_x, other=0.0).to(tl.float32)
    total = tl.load(b2 + columns, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, hidden, UNITS):
        units = start + tl.arange(0, UNITS)
        known = units < hidden
        rows = w1 + units[:, None] * inner + columns[None, :]
        first = tl.load(rows, mask=known[:, None] & of_x[None, :], other=0.0).to(tl.float32)
        rows = w2 + columns[None, :] * hidden + units[:, None]
        second = tl.load(rows, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
        unit = tl.sum(first * value[None, :], axis=1)
        unit += tl.load(b1 + units, mask=known, other=0.0).to(tl.float32)
        unit = tl.where(unit <= 0, 0.0, unit)  # what is not a number stays so
        tl.store(u + image * hidden + units, unit, mask=known)
        total += tl.sum(second * unit[:, None], axis=0)
    tl.store(out + image * width + columns, total, mask=inside)


def meta_net_fwd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, u: Tensor, out: Tensor) -> None:
    """u = relu(W_1 x + b_1), out = W_2 u + b_2.

    Args:
        x: (B, E), E <= 2048.
        w1, b1: (H, E) and (H,).
        w2, b2: (d, H) and (d,), d <= 2048, in the dtype of `w1`.
        u: (B, H) fp32, written.
        out: (B, d) in the dtype of `w1`, written.
    """
    sizes = _check(x, w1, w2, u)
    check_array("b1", b1, sizes[1:2], x, w1.dtype)
    check_array("b2", b2, sizes[3:], x, w1.dtype)
    batch, hidden, inner, width = sizes
    check_array("out", out, (batch, width), x, w1.dtype)
    if not batch:
        return
    block, units, _, warps = _tile(inner, width)
    with torch.cuda.device_of(x):
        _meta_net_fwd_kernel[(batch,)](
            x, w1, b1, w2, b2, u, out, hidden, inner, width,
            BLOCK=block, UNITS=units, num_warps=warps, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "hidden"])
def _meta_net_bwd_kernel(
    x, w2, u, d_out, d_w1, d_b1, d_w2, d_b2, batch, hidden, inner, width,
    BLOCK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside, of_x = columns < width, columns < inner
    weight = tl.load(w2 + columns * hidden + unit, mask=inside, other=0.0).to(tl.float32)
    of_w1 = tl.zeros((BLOCK,), dtype=tl.float32)
    of_w2 = tl.zeros((BLOCK,), dtype=tl.float32)
    of_b2 = tl.zeros((BLOCK,), dtype=tl.float32)
    of_b1 = tl.zeros((), dtype=tl.float32)
    for start in range(0, batch, IMAGES):
        images = start + tl.arange(0, IMAGES)
        known = images < batch
        at = images.to(tl.int64)[:, None]
        there = known[:, None] & inside[None, :]
        gradient = tl.load(d_out + at * width + columns[None, :], mask=there, other=0.0).to(tl.float32)
        there = known[:, None] & of_x[None, :]
        value = tl.load(x + at * inner + columns[None, :], mask=there, other=0.0).to(tl.float32)
        own = tl.load(u + images.to(tl.int64) * hidden + unit, mask=known, other=0.0)
        # d_u = W_2^T d_out where the unit is active; d_W_2 = d_out u^T, d_W_1 = d_u x^T
        of_unit = tl.where(own <= 0, 0.0, tl.sum(gradient * weight[None, :], axis=1))
        of_w2 += tl.sum(gradient * own[:, None], axis=0)
        of_w1 += tl.sum(value * of_unit[:, None], axis=0)
        of_b2 += tl.sum(gradient, axis=0)
        of_b1 += tl.sum(of_unit, axis=0)
    tl.store(d_w1 + unit * inner + columns, of_w1, mask=of_x)
    tl.store(d_w2 + columns * hidden + unit, of_w2, mask=inside)
    tl.store(d_b1 + unit, of_b1)
    tl.store(d_b2 + columns, of_b2, mask=inside & (unit == 0))


def meta_net_bwd(
    x: Tensor,
    w2: Tensor,
    u: Tensor,
    d_out: Tensor,
    d_w1: Tensor,
    d_b1: Tensor,
    d_w2: Tensor,
    d_b2: Tensor,
) -> None:
    """With d_u = (W_2^T d_out) [u > 0]: d_W_1 = d_u x^T, d_b_1 = d_u, d_W_2 = d_out u^T, d_b_2 = d_out, summed over images.

    Args:
        x, w2, u: of :func:`meta_net_fwd`.
        d_out: (B, d) in the dtype of `w2`.
        d_w1, d_b1, d_w2, d_b2: (H, E), (H,), (d, H) and (d,) in the dtype of `w2`, written.
    """
    batch, hidden, inner, width = _check(x, d_w1, w2, u)
    for name, one, shape in (
        ("d_out", d_out, (batch, width)),
        ("d_b1", d_b1, (hidden,)),
        ("d_w2", d_w2, (width, hidden)),
        ("d_b2", d_b2, (width,)),
    ):
        check_array(name, one, shape, x, w2.dtype)
    block, _, images, warps = _tile(inner, width)
    with torch.cuda.device_of(x):
        _meta_net_bwd_kernel[(hidden,)](
            x, w2, u, d_out, d_w1, d_b1, d_w2, d_b2, batch, hidden, inner, width,
            BLOCK=block, IMAGES=images, num_warps=warps, num_stages=1,
        )  # fmt: skip


def _check(x: Tensor, w1: Tensor, w2: Tensor, u: Tensor) -> tuple[int, int, int, int]:
    """B, H, E and d, of the features, the hidden units and both matrices, or a matrix's gradient in its place."""
    if x.ndim != 2 or w1.ndim != 2 or w2.ndim != 2:
        raise ValueError(
            f"`x`, `w1` and `w2` must be matrices, got {tuple(x.shape)}, {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    (batch, inner), (width, hidden) = x.shape, w2.shape
    check_array("x", x, (batch, inner), x)
    check_array("w1", w1, (hidden, inner), x, w2.dtype)
    check_array("w2", w2, (width, hidden), x)
    check_array("u", u, (batch, hidden), x, torch.float32)
    return batch, hidden, inner, width


def _tile(inner: int, width: int) -> tuple[int, int, int, int]:
    block, _ = row_block(max(inner, width))
    return block, *TILES[block]


def _variants() -> tuple[Variant, ...]:
    """Features and weights of each type, and half-precision features with fp32 weights, as master copies are."""
    found = []
    for dtype in STORAGE:
        f = f"*{dtype}"
        for block, warps in ROW_BLOCKS.items():
            signature = {"x": f, "out": f, "width": "i32"}
            found.append(Variant(_unit_rows_kernel, f"E<={block}", dtype, signature, {"BLOCK": block}, warps))
        for weights in dict.fromkeys((dtype, "fp32")):
            w = f"*{weights}"
            forward = {"x": f, **dict.fromkeys(("w1", "b1", "w2", "b2"), w), "u": "*fp32", "out": w}
            forward |= dict.fromkeys(("hidden", "inner", "width"), "i32")
            gradients = dict.fromkeys(("d_out", "d_w1", "d_b1", "d_w2", "d_b2"), w)
            backward = {"x": f, "w2": w, "u": "*fp32", **gradients}
            backward |= dict.fromkeys(("batch", "hidden", "inner", "width"), "i32")
            for block, (units, images, warps) in TILES.items():
                name = f"widths<={block}" + (", fp32 weights" if weights != dtype else "")
                fixed = {"BLOCK": block, "UNITS": units}
                found.append(Variant(_meta_net_fwd_kernel, name, dtype, forward, fixed, warps))
                fixed = {"BLOCK": block, "IMAGES": images}
                found.append(Variant(_meta_net_bwd_kernel, name, dtype, backward, fixed, warps))
    return tuple(found)


VARIANTS = _variants()
