"""The operations of :mod:`cocoop_fast.ops.table` by the Triton kernels, on GPUs of NVIDIA and AMD.

Importing this module imports Triton. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.kernels import activation, assemble_prompts, head, layer_norm, move_rows, rows
from cocoop_fast.kernels.tree_attention import TreeAttention
from cocoop_fast.ops.linear import FrozenLinear, GemmLinear
from cocoop_fast.prompts.tree import ClassTree

PANEL_ROWS: int | None = None
ROW_PADDING: int = 0

known_arguments = rows.known_arguments
record = None  # a CUDA graph does that
layer_norm_fwd = layer_norm.layer_norm_fwd
layer_norm_bwd = layer_norm.layer_norm_bwd
activation_fwd = activation.activation_fwd
activation_bwd = activation.activation_bwd
assemble_prompts_fwd = assemble_prompts.assemble_prompts_fwd
assemble_prompts_bwd = assemble_prompts.assemble_prompts_bwd
assemble_dense = assemble_prompts.assemble_dense
gather_rows = move_rows.gather_rows
add_rows = move_rows.add_rows
head_fwd = head.head_fwd
head_bwd = head.head_bwd
cross_entropy_fwd = head.cross_entropy_fwd
cross_entropy_bwd = head.cross_entropy_bwd


def frozen_linear(layer: Affine, *, packed: bool) -> FrozenLinear:
    from cocoop_fast.ops import triton

    return GemmLinear(layer, triton)


def packed_bytes(columns: int, inner: int) -> int:
    return 0


def tree_attention(tree: ClassTree, queries: Tensor | None, device: torch.device) -> TreeAttention:
    return TreeAttention(tree, queries, device)
