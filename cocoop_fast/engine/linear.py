"""Frozen linear layers on a CPU, with what follows them in the same pass: bias, residual, activation.

Where the processor has AVX2 or AVX-512, own kernels serve: they keep the weight packed for the forward, write into the
caller's buffers and fuse. Elsewhere the vendor's library does, reached through torch (Apple's, for one, uses matrix
units that no portable code reaches). docs/performance.md has the comparison.

Shapes: n rows, k in, w out. All float32; rows any stride apart.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops import cpu


class FrozenLinear(Protocol):
    """y = x W^T + b with a frozen W (w, k): backward is the input's gradient alone."""

    def forward(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """out (n, w) = x W^T + b (+ residual (n, w), which may be `out`)."""

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None:
        """u (n, w) = x W^T + b, out = act(u); `u` is kept for the backward, if it is given."""

    def backward(self, dy: Tensor, dx: Tensor) -> None:
        """dx (n, k) = dy (n, w) W."""

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
        """du (n, k) = (dy W) act'(u): for a layer whose input is act(u)."""


class PackedLinear:
    """By the C++ kernels; holds a packed copy of the weight beside it."""

    def __init__(self, layer: Affine) -> None:
        self.weight, self.bias = layer.weight.contiguous(), layer.bias.contiguous()
        self.packed = cpu.pack_weight(self.weight)

    def forward(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        cpu.linear_fwd(x, self.packed, self.bias, residual, out)

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None:
        cpu.linear_activation_fwd(x, self.packed, self.bias, kind, u, out)

    def backward(self, dy: Tensor, dx: Tensor) -> None:
        cpu.linear_bwd(dy, self.weight, dx)

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
        cpu.linear_activation_bwd(dy, self.weight, u, kind, du)


class LibraryLinear:
    """By torch's own matrix products."""

    def __init__(self, layer: Affine) -> None:
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        if residual is None:
            torch.addmm(self.bias, x, self.weight.T, out=out)
        else:
            torch.addmm(residual, x, self.weight.T, out=out)
            out.add_(self.bias)

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None:
        u = out if u is None else u
        torch.addmm(self.bias, x, self.weight.T, out=u)
        cpu.activation_fwd(u, None, kind, out)

    def backward(self, dy: Tensor, dx: Tensor) -> None:
        torch.mm(dy, self.weight, out=dx)

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
        torch.mm(dy, self.weight, out=du)
        cpu.activation_bwd(u, None, kind, du)


def frozen_linear(layer: Affine) -> FrozenLinear:
    """The faster implementation for this processor."""
    return LibraryLinear(layer) if cpu.isa() == "portable" else PackedLinear(layer)
