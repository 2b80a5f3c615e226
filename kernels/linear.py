"""Frozen linear layers with what follows them in the same pass: bias and activation, its slope, residual and LayerNorm.

`linear_activation`: one program owns a tile of the result, 64 by 64 numbers below 1024 rows and 128 by 128 above (in
fp32 about half of that), and adds up the products in registers. Forward it adds the bias, writes the pre-activation if
backward follows, and the activation; backward it reads the pre-activation and multiplies by the slope. Beside its
product it moves 4 d s bytes a row of w = 4d numbers of s bytes, where product and activation apart move 8 d s forward
and 12 d s backward.

`linear_norm`: one program owns 32 whole rows (16 in fp32), d <= 512. Forward it adds bias and residual, writes the row,
and its LayerNorm; backward it takes the product for the gradient of a LayerNorm and adds that of its input to the row's
gradient. Beside its product it moves 2 d s bytes a row, where a LayerNorm apart moves 4 d s.

Predicted at ViT-B/16's width in half precision, before anything was counted: of the 47 d s bytes a row and layer that a
step moves beside its products (attention 11, LayerNorm 16, activation 20), 27 are left, 43 percent less (then counted:
42); a layer is 5 launches forward and 6 backward instead of 8 and 9 (so it is). At K = 100 and B = 1 a step is bound by
launches: 25 to 30 percent less time outside of a graph, 10 in one. At K = 1000 the activation's epilogue saves 5 to 10
percent of a step if the product is as fast as the vendor's; and LayerNorm's loses: 32 rows a program read the whole
weight from the L2 cache, 2 MB for 4d by d, 250 MB a product at 4007 rows, 45 us against 20 for product and LayerNorm
apart. So nothing chooses these kernels by itself: the backend is `triton-gemm`, until a GPU says for which rows it is
the faster. In fp32 the matrix products are exact ("ieee") as torch's are unless `torch.set_float32_matmul_precision`
allows TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import KINDS, activate, slope_of
from .rows import check_array, check_rows, row_layout
from .tree_attention_kernels import operand
from .variants import STORAGE, Variant

# Rows, columns and inner numbers of a tile, warps, stages; in half precision and in fp32.
SMALL = {"half": (64, 64, 32, 8, 3), "fp32": (32, 64, 16, 4, 2)}
LARGE = {"half": (128, 128, 32, 8, 3), "fp32": (64, 64, 16, 8, 2)}
FEW_ROWS = 1024  # with the small tiles: large ones would leave multiprocessors idle
# Whole rows of at most so many columns: rows, inner numbers, warps, stages. Wider ones spill registers, and so do TF32's.
WIDEST = 512
WHOLE = {"half": (32, 32, 8, 2), "fp32": (16, 16, 8, 2)}


@triton.jit
def _product(
    x, w, row, column, rows, width, inner, stride_x, stride_w,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x W^T for W (width, inner), or with BACKWARD x W for W (inner, width), in fp32."""
    k = tl.arange(0, BLOCK_K)
    x += row.to(tl.int64)[:, None] * stride_x + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        within = start + k < inner
        left = tl.load(x + start, mask=(row < rows)[:, None] & within[None, :], other=0.0)
        if BACKWARD:
            at = w + (start + k)[:, None] * stride_w + column[None, :]
        else:
            # As it is multiplied, and not turned afterwards, which would keep loads and products from overlapping.
            at = w + column[None, :] * stride_w + (start + k)[:, None]
        right = tl.load(at, mask=within[:, None] & (column < width)[None, :], other=0.0)
        total = tl.dot(operand(left, left), operand(right, right), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["rows"])
def _linear_activation_kernel(
    x,
    w,
    bias,
    u,
    out,
    rows,
    inner,
    width,
    stride_x,
    stride_w,
    stride_u,
    stride_out,
    KIND: tl.constexpr,
    BACKWARD: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The tiles of the same rows run one after the other, so that the rows come from the cache.
    tiles = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(
        x, w, row, column, rows, width, inner, stride_x, stride_w, BACKWARD, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < width)[None, :]
    u += row.to(tl.int64)[:, None] * stride_u + column[None, :]
    out += row.to(tl.int64)[:, None] * stride_out + column[None, :]
    if BACKWARD:
        value = tl.load(u, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total * slope_of(value, KIND), mask=inside)
    else:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        # Rounded before it is activated: backward reads the rounded one.
        rounded = total.to(out.dtype.element_ty)
        if KEEP:
            tl.store(u, rounded, mask=inside)
        tl.store(out, activate(rounded.to(tl.float32), KIND), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _linear_norm_fwd_kernel(
    x,
    w,
    bias,
    residual,
    gamma,
    beta,
    out,
    y,
    mean,
    rstd,
    rows,
    inner,
    width,
    stride_x,
    stride_w,
    stride_residual,
    stride_out,
    stride_y,
    eps,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    total = _product(
        x, w, row, column, rows, width, inner, stride_x, stride_w, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    far, there = row.to(tl.int64)[:, None], column < width
    inside = (row < rows)[:, None] & there[None, :]
    total += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    total += tl.load(residual + far * stride_residual + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    # Rounded before it is normalised: the statistics are those of the row that backward reads.
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + far * stride_out + column[None, :], rounded, mask=inside)
    value = rounded.to(tl.float32)
    row_mean = tl.sum(value, axis=1) / width
    centred = tl.where(there[None, :], value - row_mean[:, None], 0.0)
    row_rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight = tl.load(gamma + column, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(beta + column, mask=there, other=0.0).to(tl.float32)
    normed = centred * row_rstd[:, None] * weight[None, :] + shift[None, :]
    tl.store(y + far * stride_y + column[None, :], normed, mask=inside)
    tl.store(mean + row, row_mean, mask=row < rows)
    tl.store(rstd + row, row_rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _linear_norm_bwd_kernel(
    dy,
    w,
    x,
    gamma,
    mean,
    rstd,
    dx,
    rows,
    inner,
    width,
    stride_dy,
    stride_w,
    stride_x,
    stride_dx,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    total = _product(
        dy, w, row, column, rows, width, inner, stride_dy, stride_w, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    far, there = row.to(tl.int64)[:, None], column < width
    inside = (row < rows)[:, None] & there[None, :]
    # Outside, other=0 makes g zero, and with it every term of both sums.
    g = total * tl.load(gamma + column, mask=there, other=0.0).to(tl.float32)[None, :]
    row_mean = tl.load(mean + row, mask=row < rows, other=0.0)
    row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)
    value = tl.load(x + far * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    normed = (value - row_mean[:, None]) * row_rstd[:, None]
    mean_g = tl.sum(g, axis=1) / width
    mean_g_normed = tl.sum(g * normed, axis=1) / width
    gradient = row_rstd[:, None] * (g - mean_g[:, None] - normed * mean_g_normed[:, None])
    dx += far * stride_dx + column[None, :]
    if ACCUMULATE:
        gradient += tl.load(dx, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx, gradient, mask=inside)


def linear_activation_fwd(
    x: Tensor, w: Tensor, bias: Tensor, kind: str, u: Tensor | None, out: Tensor
) -> None:
    """u = x W^T + b, out = act(u).

    Args:
        x: rows (n, k).
        w: (w, k), its rows contiguous.
        bias: (w,).
        kind: "quick_gelu" or "gelu".
        u: rows (n, w), written; None: not wanted.
        out: rows (n, w), written; not `u`.
    """
    _linear_activation(x, w, bias, kind, out if u is None else u, out, backward=False, keep=u is not None)


def linear_activation_bwd(dy: Tensor, w: Tensor, kind: str, u: Tensor, du: Tensor) -> None:
    """du = (dy W) act'(u).

    Args:
        dy: rows (n, w).
        w: (w, k), its rows contiguous.
        kind: "quick_gelu" or "gelu".
        u: rows (n, k).
        du: rows (n, k), written.
    """
    _linear_activation(dy, w, w, kind, u, du, backward=True, keep=True)


def _linear_activation(
    x: Tensor, w: Tensor, bias: Tensor, kind: str, u: Tensor, out: Tensor, *, backward: bool, keep: bool
) -> None:
    if kind not in KINDS:
        raise ValueError(f"`kind` must be {' or '.join(KINDS)}, got {kind!r}")
    inner, width = _check_product(x, w, out, backward=backward)
    row_layout(out=out, u=u)
    if not backward:
        check_array("bias", bias, (width,), x)
    rows = len(x)
    if not rows:
        return
    block_m, block_n, block_k, warps, stages = (SMALL if rows < FEW_ROWS else LARGE)[_store(x)]
    with torch.cuda.device_of(x):
        _linear_activation_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(width, block_n),)](
            x, w, bias, u, out, rows, inner, width, x.stride(0), w.stride(0), u.stride(0), out.stride(0),
            KIND=kind, BACKWARD=backward, KEEP=keep, PRECISION=_precision(x),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def linear_norm_fwd(
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """out = x W^T + b + residual, y = LN(out).

    Args:
        x: rows (n, k).
        w: (d, k), its rows contiguous; d <= 512.
        bias, gamma, beta: (d,).
        residual: rows (n, d).
        eps: LayerNorm's epsilon.
        out, y: rows (n, d), written.
        mean, rstd: (n,) fp32, written.
    """
    inner, width = _check_product(x, w, out, backward=False)
    row_layout(out=out, residual=residual, y=y)
    for name, array in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        check_array(name, array, (width,), x)
    _check_whole(width)
    rows, (block_m, block_k, warps, stages) = len(x), WHOLE[_store(x)]
    check_array("mean", mean, (rows,), x, torch.float32)
    check_array("rstd", rstd, (rows,), x, torch.float32)
    if not rows:
        return
    with torch.cuda.device_of(x):
        _linear_norm_fwd_kernel[(triton.cdiv(rows, block_m),)](
            x, w, bias, residual, gamma, beta, out, y, mean, rstd, rows, inner, width,
            x.stride(0), w.stride(0), residual.stride(0), out.stride(0), y.stride(0), eps,
            PRECISION="ieee", BLOCK_M=block_m, BLOCK_N=WIDEST, BLOCK_K=block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def linear_norm_bwd(
    dy: Tensor,
    w: Tensor,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    *,
    accumulate: bool,
) -> None:
    """dx (+)= the gradient by x of LN(x), whose result has the gradient dy W.

    Args:
        dy: rows (n, w).
        w: (w, d), its rows contiguous; d <= 512.
        x: rows (n, d), what the LayerNorm read.
        gamma: (d,).
        mean, rstd: (n,) fp32, of the forward.
        dx: rows (n, d); added to if `accumulate`, else written.
    """
    inner, width = _check_product(dy, w, dx, backward=True)
    row_layout(dx=dx, x=x)
    check_array("gamma", gamma, (width,), x)
    _check_whole(width)
    rows, (block_m, block_k, warps, stages) = len(x), WHOLE[_store(x)]
    check_array("mean", mean, (rows,), x, torch.float32)
    check_array("rstd", rstd, (rows,), x, torch.float32)
    if not rows:
        return
    with torch.cuda.device_of(x):
        _linear_norm_bwd_kernel[(triton.cdiv(rows, block_m),)](
            dy, w, x, gamma, mean, rstd, dx, rows, inner, width,
            dy.stride(0), w.stride(0), x.stride(0), dx.stride(0),
            ACCUMULATE=accumulate, PRECISION="ieee", BLOCK_M=block_m, BLOCK_N=WIDEST, BLOCK_K=block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def takes_whole_rows(rows: Tensor) -> bool:
    """Whether a program can own whole rows of this width, of a product in the precision that torch's are in."""
    return rows.shape[1] <= WIDEST and _precision(rows) == "ieee"


def _check_product(x: Tensor, w: Tensor, out: Tensor, *, backward: bool) -> tuple[int, int]:
    """The inner size and the width of x W^T, or with `backward` of x W."""
    for name, rows in (("x", x), ("w", w), ("out", out)):
        check_rows(name, rows, x)
    width, inner = w.shape[::-1] if backward else w.shape
    if x.ndim != 2 or x.dtype != w.dtype or tuple(out.shape) != (len(x), width) or x.shape[1] != inner:
        raise ValueError(
            f"a product of {x.dtype} {tuple(x.shape)} with {'W' if backward else 'W^T'}, W {w.dtype} {tuple(w.shape)}, "
            f"into {tuple(out.shape)}"
        )
    return inner, width


def _store(x: Tensor) -> str:
    return "fp32" if x.dtype == torch.float32 else "half"


def _check_whole(width: int) -> None:
    if width > WIDEST:
        raise ValueError(f"rows of {width} numbers: a program takes at most {WIDEST}")


def _precision(x: Tensor) -> str:
    """As torch's own products: TF32 where it is allowed, which AMD's GPUs do not have, and NVIDIA's from sm_80 on."""
    if x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" or torch.version.hip:
        return "ieee"
    return "ieee" if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0) else "tf32"


def _variants() -> tuple[Variant, ...]:
    found = []
    for dtype in STORAGE:
        size = "fp32" if dtype == "fp32" else "half"
        r, sizes = f"*{dtype}", {"rows": "i32", "inner": "i32", "width": "i32"}
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            told = ", TF32" * (precision == "tf32")
            signature = dict.fromkeys(("x", "w", "bias", "u", "out"), r) | sizes
            signature |= dict.fromkeys(("stride_x", "stride_w", "stride_u", "stride_out"), "i32")
            for tile in (SMALL[size], LARGE[size]):
                block_m, block_n, block_k, warps, stages = tile
                blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "PRECISION": precision}
                for kind in KINDS:
                    for backward, keep in ((False, False), (False, True), (True, True)):
                        name = (
                            f"{kind}, {block_m}x{block_n}"
                            + ", slope" * backward
                            + ", kept" * (keep and not backward)
                        )
                        fixed = {"KIND": kind, "BACKWARD": backward, "KEEP": keep, **blocks}
                        found.append(
                            Variant(
                                _linear_activation_kernel, name + told, dtype, signature, fixed, warps, stages
                            )
                        )
            for weights in dict.fromkeys((dtype, "fp32")) if precision == "ieee" else ():
                forward = dict.fromkeys(("x", "w", "bias", "residual", "out", "y"), r)
                forward |= {
                    "gamma": f"*{weights}",
                    "beta": f"*{weights}",
                    "mean": "*fp32",
                    "rstd": "*fp32",
                    **sizes,
                }
                strides = ("stride_x", "stride_w", "stride_residual", "stride_out", "stride_y")
                forward |= dict.fromkeys(strides, "i32") | {"eps": "fp32"}
                backward_ = {
                    "dy": r,
                    "w": r,
                    "x": r,
                    "gamma": f"*{weights}",
                    "mean": "*fp32",
                    "rstd": "*fp32",
                    "dx": r,
                }
                backward_ |= sizes | dict.fromkeys(("stride_dy", "stride_w", "stride_x", "stride_dx"), "i32")
                block_m, block_k, warps, stages = WHOLE[size]
                blocks = {"PRECISION": precision, "BLOCK_M": block_m, "BLOCK_N": WIDEST, "BLOCK_K": block_k}
                name = f"d<={WIDEST}" + ", fp32 weights" * (weights != dtype)
                found.append(Variant(_linear_norm_fwd_kernel, name, dtype, forward, blocks, warps, stages))
                for flag in (False, True):
                    full, fixed = name + ", accumulate" * flag, {"ACCUMULATE": flag, **blocks}
                    found.append(
                        Variant(_linear_norm_bwd_kernel, full, dtype, backward_, fixed, warps, stages)
                    )
    return tuple(found)


VARIANTS = _variants()
