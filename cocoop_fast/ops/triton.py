"""Launchers of the Triton kernels, as :mod:`cocoop_fast.ops.cpu` has them.

Tensors are on one device, rows and weights in float16, bfloat16 or float32; statistics, logits and losses are float32.
Results are written into tensors of the caller, nothing of activation size is allocated and nothing waits for the device:
the logit scale, the loss and its gradient are (1,) tensors there. `layer_norm_fwd` takes a residual as well.
Importing this module imports Triton.
"""

from __future__ import annotations

from cocoop_fast.kernels.activation import activation_bwd, activation_fwd
from cocoop_fast.kernels.assemble_prompts import assemble_dense, assemble_prompts_bwd, assemble_prompts_fwd
from cocoop_fast.kernels.head import cross_entropy_bwd, cross_entropy_fwd, head_bwd, head_fwd
from cocoop_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from cocoop_fast.kernels.move_rows import gather_rows, scatter_rows
from cocoop_fast.kernels.tree_attention import ImageRows, TreeAttention

__all__ = [
    "ImageRows",
    "TreeAttention",
    "activation_bwd",
    "activation_fwd",
    "assemble_dense",
    "assemble_prompts_bwd",
    "assemble_prompts_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "gather_rows",
    "head_bwd",
    "head_fwd",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "scatter_rows",
]
