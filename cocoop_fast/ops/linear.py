"""Frozen linear layers, with what follows them in the same pass: bias, residual, LayerNorm, activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.clip.frozen import Affine

if TYPE_CHECKING:
    from cocoop_fast.ops.table import Ops


def linear_ref(x: Tensor, layer: Affine) -> Tensor:
    """y = x W^T + b.

    Args:
        x: (..., in).
        layer: weight (out, in) and bias (out,), in the dtype of `x`.

    Returns:
        (..., out).
    """
    return F.linear(x, layer.weight, layer.bias)


class FrozenLinear(Protocol):
    """y = x W^T + b, whose backward is the input's gradient alone.

    Shapes: n rows, W (w, k), b (w,). The rows of a matrix are contiguous and any stride apart.
    """

    @property
    def packed_bytes(self) -> int:
        """Of the copy of the weight that it keeps."""

    def forward(self, x: Tensor, out: Tensor) -> None:
        """out (n, w) = x W^T + b."""

    def forward_norm(
        self, x: Tensor, residual: Tensor, out: Tensor, norm: Affine, y: Tensor, mean: Tensor, rstd: Tensor
    ) -> None:
        """out (n, w) = x W^T + b + residual (n, w), y (n, w) = LN(out), with its statistics (n,) float32."""

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None:
        """u (n, w) = x W^T + b, out (n, w) = act(u); `u` is kept for the backward, if it is given."""

    def backward(self, dy: Tensor, dx: Tensor) -> None:
        """dx (n, k) = dy (n, w) W."""

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
        """du (n, k) = (dy W) act'(u): for a layer whose input is act(u)."""


class GemmLinear:
    """By the vendor's matrix products, reached through torch, and a backend's kernels for what follows them.

    A product that adds a residual would copy it into its result first, so the LayerNorm behind adds residual and bias.
    """

    packed_bytes: int = 0

    def __init__(self, layer: Affine, ops: Ops) -> None:
        self.weight, self.bias, self.ops = layer.weight, layer.bias, ops

    def forward(self, x: Tensor, out: Tensor) -> None:
        torch.addmm(self.bias, x, self.weight.T, out=out)

    def forward_norm(
        self, x: Tensor, residual: Tensor, out: Tensor, norm: Affine, y: Tensor, mean: Tensor, rstd: Tensor
    ) -> None:
        torch.mm(x, self.weight.T, out=out)
        self.ops.layer_norm_fwd(out, self.bias, residual, norm.weight, norm.bias, norm.eps, y, mean, rstd)

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None:
        u = out if u is None else u
        torch.addmm(self.bias, x, self.weight.T, out=u)
        self.ops.activation_fwd(u, kind, out)

    def backward(self, dy: Tensor, dx: Tensor) -> None:
        torch.mm(dy, self.weight, out=dx)

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
        torch.mm(dy, self.weight, out=du)
        self.ops.activation_bwd(u, kind, du)
