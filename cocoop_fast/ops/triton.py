"""The operations of :mod:`cocoop_fast.ops.table` by the Triton kernels, on GPUs of NVIDIA and AMD.

Importing this module imports Triton. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.kernels.activation import activation_bwd, activation_fwd
from cocoop_fast.kernels.assemble_prompts import assemble_dense, assemble_prompts_bwd, assemble_prompts_fwd
from cocoop_fast.kernels.head import cross_entropy_bwd, cross_entropy_fwd, head_bwd, head_fwd
from cocoop_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from cocoop_fast.kernels.move_rows import add_rows, gather_rows
from cocoop_fast.kernels.tree_attention import TreeAttention
from cocoop_fast.ops.linear import FrozenLinear, GemmLinear
from cocoop_fast.prompts.tree import ClassTree

__all__ = [
    "PANEL_ROWS",
    "ROW_PADDING",
    "activation_bwd",
    "activation_fwd",
    "add_rows",
    "assemble_dense",
    "assemble_prompts_bwd",
    "assemble_prompts_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "frozen_linear",
    "gather_rows",
    "head_bwd",
    "head_fwd",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "packed_bytes",
    "tree_attention",
]

PANEL_ROWS: int | None = None
ROW_PADDING: int = 0


def frozen_linear(layer: Affine, *, packed: bool) -> FrozenLinear:
    from cocoop_fast.ops import triton

    return GemmLinear(layer, triton)


def packed_bytes(columns: int, inner: int) -> int:
    return 0


def tree_attention(tree: ClassTree, queries: Tensor | None, device: torch.device) -> TreeAttention:
    return TreeAttention(tree, queries, device)
