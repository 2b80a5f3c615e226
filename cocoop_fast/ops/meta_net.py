"""CoCoOp's Meta-Net, and the unit length of the image features that it reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.ops.table import SmallOps, select_small_ops


def unit_rows_ref(x: Tensor) -> Tensor:
    """x / |x|, row by row: (n, d) of floats; zeros become NaN."""
    return x / x.norm(dim=-1, keepdim=True)


def unit_rows(x: Tensor, backend: str = "auto") -> Tensor:
    """:func:`unit_rows_ref` by the best backend; in torch's operations where a gradient of `x` is wanted."""
    if x.requires_grad and torch.is_grad_enabled():
        return unit_rows_ref(x)
    small = _small_ops(x, x.shape[1], backend)
    if small is None:
        return unit_rows_ref(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    small.unit_rows(x.contiguous(), out)
    return out


def meta_net_ref(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """h = W_2 relu(W_1 x + b_1) + b_2 (paper, section 3.2).

    Args:
        x: (B, E), in any float dtype.
        w1, b1: (H, E) and (H,).
        w2, b2: (d, H) and (d,).

    Returns:
        (B, d).
    """
    return F.linear(F.linear(x.to(w1.dtype), w1, b1).relu(), w2, b2)


def meta_net(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, backend: str = "auto") -> Tensor:
    """:func:`meta_net_ref` by the best backend: where kernels are launched, one kernel each way.

    Torch's operations serve where a gradient of `x` is wanted, under autocast, in what torch compiles or exports, and for
    types and widths that the kernels do not have.
    """
    weights = (w1, b1, w2, b2)
    alike = all(one.dtype == w1.dtype and one.is_contiguous() for one in weights)
    fixed = not (x.requires_grad and torch.is_grad_enabled())
    small = None
    if alike and fixed and w1.dtype in (x.dtype, torch.float32):
        small = _small_ops(x, max(w1.shape[1], w2.shape[0]), backend)
    if small is None or torch.is_autocast_enabled(x.device.type):
        return meta_net_ref(x, *weights)
    out: Tensor = _MetaNet.apply(x.contiguous(), *weights, small)
    return out


def _small_ops(x: Tensor, widest: int, backend: str) -> SmallOps | None:
    if torch.compiler.is_compiling():
        return None
    small = select_small_ops(x.device, x.dtype, backend)
    return small if small is not None and widest <= small.WIDEST else None


class _MetaNet(torch.autograd.Function):
    """Saved: the features and the hidden units."""

    @staticmethod
    def forward(
        node: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, small: SmallOps
    ) -> Tensor:
        u = torch.empty(len(x), len(w1), device=x.device)
        out = w1.new_empty(len(x), len(w2))
        small.meta_net_fwd(x, w1, b1, w2, b2, u, out)
        node.small = small
        node.save_for_backward(x, w1, b1, w2, b2, u)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(node: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights, u = node.saved_tensors
        gradients = [torch.empty_like(one) for one in weights]
        node.small.meta_net_bwd(x, weights[2], u, grad_out.contiguous(), *gradients)
        return None, *gradients, None
