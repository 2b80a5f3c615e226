"""The MLP's activation and its gradient: QuickGELU u s(1.702 u) or the exact GELU u Phi(u).

One program owns a stretch of 1024 columns of one row. Memory traffic a row of w = 4d numbers of s bytes: forward 2 w s
(u in, result out), backward 3 w s (u and dg in, dg out). Eight numbers a thread are one 16-byte load in half
precision, and the arithmetic (an exponential or an error function a number) hides behind it.
Predicted: 80 to 90 % of the memory's bandwidth from some thousand rows on, where QuickGELU is used; with the error
function 70 to 85 % in half precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import row_layout, row_offset
from .variants import STORAGE, Variant

KINDS = ("quick_gelu", "gelu")
BLOCK, WARPS = 1024, 4


@triton.jit
def activate(value, KIND: tl.constexpr):
    """act(u) in fp32."""
    if KIND == "quick_gelu":
        result = value * tl.sigmoid(1.702 * value)
    else:
        result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    return result


@triton.jit
def slope_of(value, KIND: tl.constexpr):
    """act'(u) in fp32."""
    if KIND == "quick_gelu":  # s + 1.702 u s (1 - s), s = sigmoid(1.702 u)
        s = tl.sigmoid(1.702 * value)
        slope = s + 1.702 * value * s * (1.0 - s)
    else:  # Phi(u) + u phi(u), phi the normal density
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        slope = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476)) + value * density
    return slope


@triton.jit(do_not_specialize=["per_image"])
def _activation_fwd_kernel(
    u,
    out,
    per_image,
    width,
    stride_ub,
    stride_ur,
    stride_ob,
    stride_or,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    u += row_offset(row, per_image, stride_ub, stride_ur)
    out += row_offset(row, per_image, stride_ob, stride_or)
    value = tl.load(u + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + columns, activate(value, KIND), mask=inside)


def activation_fwd(u: Tensor, kind: str, out: Tensor) -> None:
    """out = act(u).

    Args:
        u: rows (n, w) or (B, n/B, w).
        kind: "quick_gelu" or "gelu".
        out: rows, written; may be `u`.
    """
    _launch(_activation_fwd_kernel, u, kind, out)


@triton.jit(do_not_specialize=["per_image"])
def _activation_bwd_kernel(
    u,
    dg,
    per_image,
    width,
    stride_ub,
    stride_ur,
    stride_dgb,
    stride_dgr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    u += row_offset(row, per_image, stride_ub, stride_ur)
    dg += row_offset(row, per_image, stride_dgb, stride_dgr)
    value = tl.load(u + columns, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dg + columns, mask=inside, other=0.0).to(tl.float32) * slope_of(value, KIND)
    tl.store(dg + columns, gradient, mask=inside)


def activation_bwd(u: Tensor, kind: str, dg: Tensor) -> None:
    """dg *= act'(u): from the gradient of the output to that of `u`, in place.

    Args:
        u: rows (n, w) or (B, n/B, w).
        kind: "quick_gelu" or "gelu".
        dg: rows, changed.
    """
    _launch(_activation_bwd_kernel, u, kind, dg)


def _launch(kernel, u: Tensor, kind: str, result: Tensor) -> None:
    if kind not in KINDS:
        raise ValueError(f"`kind` must be {' or '.join(KINDS)}, got {kind!r}")
    rows = row_layout(u=u, result=result)
    if not rows.count:
        return
    with torch.cuda.device_of(u):
        kernel[(rows.count, triton.cdiv(rows.width, BLOCK))](
            u, result, rows.per_image, rows.width, *rows.strides,
            KIND=kind, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
        )  # fmt: skip


def _variants() -> tuple[Variant, ...]:
    found = []
    for kernel, result, initial in (
        (_activation_fwd_kernel, "out", "o"),
        (_activation_bwd_kernel, "dg", "dg"),
    ):
        for dtype in STORAGE:
            strides = ("stride_ub", "stride_ur", f"stride_{initial}b", f"stride_{initial}r")
            signature = dict.fromkeys(("u", result), f"*{dtype}")
            signature |= dict.fromkeys(("per_image", "width", *strides), "i32")
            for kind in KINDS:
                constexprs = {"KIND": kind, "BLOCK": BLOCK}
                found.append(Variant(kernel, kind, dtype, signature, constexprs, WARPS))
    return tuple(found)


VARIANTS = _variants()
