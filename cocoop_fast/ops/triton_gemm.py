"""The operations of :mod:`cocoop_fast.ops.triton`, with matrix products of our own where something follows them: bias and
activation, residual and LayerNorm, and their gradients go with the product. See kernels/linear.py for what that gains and
what it may lose; ``auto`` never chooses it.
"""

from __future__ import annotations

from torch import Tensor

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.kernels import linear
from cocoop_fast.ops import triton
from cocoop_fast.ops.linear import FrozenLinear, GemmLinear

PANEL_ROWS = triton.PANEL_ROWS
ROW_PADDING = triton.ROW_PADDING

known_arguments = triton.known_arguments
record = None  # a CUDA graph does that
packed_bytes = triton.packed_bytes
layer_norm_fwd = triton.layer_norm_fwd
layer_norm_bwd = triton.layer_norm_bwd
activation_fwd = triton.activation_fwd
activation_bwd = triton.activation_bwd
tree_attention = triton.tree_attention
assemble_prompts_fwd = triton.assemble_prompts_fwd
assemble_prompts_bwd = triton.assemble_prompts_bwd
assemble_dense = triton.assemble_dense
gather_rows = triton.gather_rows
add_rows = triton.add_rows
head_fwd = triton.head_fwd
head_bwd = triton.head_bwd
cross_entropy_fwd = triton.cross_entropy_fwd
cross_entropy_bwd = triton.cross_entropy_bwd


def frozen_linear(layer: Affine, *, packed: bool) -> FrozenLinear:
    from cocoop_fast.ops import triton_gemm

    return FusingLinear(layer, triton_gemm)


class FusingLinear(GemmLinear):
    """By the vendor's products where nothing follows them, or where a row is too wide for one program to see it whole."""

    def forward_norm(
        self, x: Tensor, residual: Tensor, out: Tensor, norm: Affine, y: Tensor, mean: Tensor, rstd: Tensor
    ) -> None:
        if not linear.takes_whole_rows(out):
            super().forward_norm(x, residual, out, norm, y, mean, rstd)
            return
        weights = self.weight, self.bias, residual, norm.weight, norm.bias, norm.eps
        linear.linear_norm_fwd(x, *weights, out, y, mean, rstd)

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None:
        linear.linear_activation_fwd(x, self.weight, self.bias, kind, u, out)

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
        linear.linear_activation_bwd(dy, self.weight, kind, u, du)

    def backward_norm(
        self,
        dy: Tensor,
        x: Tensor,
        gamma: Tensor,
        mean: Tensor,
        rstd: Tensor,
        dx: Tensor,
        h: Tensor,
        *,
        accumulate: bool,
    ) -> None:
        if linear.takes_whole_rows(dx):
            linear.linear_norm_bwd(dy, self.weight, x, gamma, mean, rstd, dx, accumulate=accumulate)
        else:
            super().backward_norm(dy, x, gamma, mean, rstd, dx, h, accumulate=accumulate)
