"""Attention along root-to-leaf paths: serves prompts of every layout.

:mod:`cocoop_fast.ops.tree_attention` gathers the keys of each row; its gathers grow with rows times path length.
Where context vectors come after the class name, or each class has its own, most rows belong to one class alone:
then gathering each path once is much less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cocoop_fast.prompts.tree import RowPaths


def path_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, fixed_k: Tensor, fixed_v: Tensor, paths: RowPaths, leaves: bool = False
) -> Tensor:
    """o_r = softmax(q_r . k_s / sqrt(D)) v_s over the rows and constants s on the path to row r, per head.

    B contexts, R rows, n paths, H heads of size D.

    Args:
        q: (B, R, H, D); or (B, n, H, D), the queries of the leaves, with `leaves`.
        k, v: (B, R, H, D).
        fixed_k, fixed_v: (1 + C, H, D): keys and values of SOS and of the constants.
        paths: which of them lead to each leaf, on the device of `q`.
        leaves: only the last row of each path asks.

    Returns:
        (B, R, H, D), or (B, n, H, D) with `leaves`.
    """
    absent = paths.rows < 0
    rows = paths.rows.clamp(min=0)  # beyond a path's end any row will do: no row of the path looks there
    length = rows.shape[1]
    if leaves:
        queries, hidden = q[:, :, None], absent[:, None]  # (B, n, 1, H, D), (n, 1, P)
    else:
        queries = q[:, rows]  # (B, n, P, H, D)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)[None]
    fixed = paths.fixed.clamp(min=0)
    scores = torch.einsum("bnqhd,bnshd->bnhqs", queries, k[:, rows])
    fixed_scores = torch.einsum("bnqhd,nfhd->bnhqf", queries, fixed_k[fixed])
    scores = scores.masked_fill(hidden[:, None], -math.inf)
    fixed_scores = fixed_scores.masked_fill((paths.fixed < 0)[:, None, None], -math.inf)
    weights = (torch.cat([fixed_scores, scores], dim=-1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    fixed_weights, weights = weights.split([fixed.shape[1], length], dim=-1)
    o = torch.einsum("bnhqf,nfhd->bnqhd", fixed_weights, fixed_v[fixed])
    o = o + torch.einsum("bnhqs,bnshd->bnqhd", weights, v[:, rows])
    return o[:, :, 0] if leaves else o.flatten(1, 2)[:, paths.place]
