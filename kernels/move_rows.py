"""Rows by index: gathered into a smaller tensor, or added to some of a larger one.

One program moves 512 columns of one row: 2 d s bytes a row of d numbers of s bytes, 3 d s when added. The EOT rows go
this way, once in the last layer of a step. Predicted: 80 to 90 % of the memory's bandwidth from some ten thousand rows
on, and below a thousand rows the time of a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import check_array, check_rows
from .variants import STORAGE, Variant

BLOCK, WARPS = 512, 1


@triton.jit(do_not_specialize=["n"])
def _move_rows_kernel(
    x,
    index,
    out,
    n,
    width,
    stride_xb,
    stride_xr,
    stride_ob,
    stride_or,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    image, i = (row // n).to(tl.int64), (row % n).to(tl.int64)
    other = tl.load(index + i)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x += image * stride_xb + (i if ADD else other) * stride_xr
    out += image * stride_ob + (other if ADD else i) * stride_or
    value = tl.load(x + columns, mask=inside)
    if ADD:
        value = value.to(tl.float32) + tl.load(out + columns, mask=inside).to(tl.float32)
    tl.store(out + columns, value, mask=inside)


def gather_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[b, i] = x[b, index[i]].

    Args:
        x: rows (B, R, d).
        index: (n,) int64, in 0 .. R - 1; not checked, as that would wait for the device.
        out: rows (B, n, d), written.
    """
    _check_shapes("x", x, index, "out", out)
    _launch(x, index, out, add=False)


def add_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[b, index[i]] += x[b, i].

    Args:
        x: rows (B, n, d).
        index: (n,) int64, in 0 .. R - 1 and all different; not checked, as that would wait for the device.
        out: rows (B, R, d), changed in the rows of `index` alone.
    """
    _check_shapes("out", out, index, "x", x)
    _launch(x, index, out, add=True)


def _check_shapes(whole_name: str, whole: Tensor, index: Tensor, part_name: str, part: Tensor) -> None:
    check_rows(whole_name, whole, whole)
    check_rows(part_name, part, whole)
    check_array("index", index, (index.numel(),), whole, torch.int64)
    if whole.ndim != 3 or tuple(part.shape) != (len(whole), len(index), whole.shape[2]):
        raise ValueError(
            f"`{whole_name}` must have shape (B, R, d) and `{part_name}` (B, n, d) with n = {len(index)}, "
            f"got {tuple(whole.shape)} and {tuple(part.shape)}"
        )


def _launch(x: Tensor, index: Tensor, out: Tensor, add: bool) -> None:
    batch, n, d = len(x), len(index), x.shape[2]
    if not batch * n * d:
        return
    with torch.cuda.device_of(x):
        _move_rows_kernel[(batch * n, triton.cdiv(d, BLOCK))](
            x, index, out, n, d, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
            ADD=add, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
        )  # fmt: skip


def _variants() -> tuple[Variant, ...]:
    found = []
    for dtype in STORAGE:
        signature = {"x": f"*{dtype}", "index": "*i64", "out": f"*{dtype}"}
        strides = ("stride_xb", "stride_xr", "stride_ob", "stride_or")
        signature |= dict.fromkeys(("n", "width", *strides), "i32")
        for name, add in (("gather", False), ("add", True)):
            found.append(
                Variant(_move_rows_kernel, name, dtype, signature, {"ADD": add, "BLOCK": BLOCK}, WARPS)
            )
    return tuple(found)


VARIANTS = _variants()
