"""Attention of tree rows: every row sees SOS, the context before it, and the path above it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cocoop_fast.prompts.tree import ClassTree


def tree_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sos_k: Tensor,
    sos_v: Tensor,
    tree: ClassTree,
    nodes: Tensor | None = None,
) -> Tensor:
    """o_r = softmax(q_r . k_s / sqrt(D)) v_s over the rows s that row r may see, per image and head.

    A context row m sees SOS and the context rows 0..m; a node sees SOS, all M context rows and its path from
    the root down to itself. B images, R = M + N rows (context first), H heads of size D.

    Args:
        q: (B, R, H, D); or (B, Q, H, D) when `nodes` selects Q nodes (the last layer reads EOT rows only).
        k, v: (B, R, H, D).
        sos_k, sos_v: (H, D): the start-of-text token's key and value, constants of the model.
        tree: the class tree, its index tensors on the device of `q` (:meth:`ClassTree.path` is moved here).
        nodes: (Q,) int64 node of each query row, or None for all R rows.

    Returns:
        (B, R or Q, H, D).
    """
    m = tree.n_ctx
    path = tree.path.to(q.device)
    if nodes is not None:
        return _attend_nodes(q, k, v, sos_k, sos_v, m, path[nodes])
    context = _attend_context(q[:, :m], k[:, :m], v[:, :m], sos_k, sos_v)
    return torch.cat([context, _attend_nodes(q[:, m:], k, v, sos_k, sos_v, m, path)], dim=1)


def _attend_context(q: Tensor, k: Tensor, v: Tensor, sos_k: Tensor, sos_v: Tensor) -> Tensor:
    keys, values = _with_sos(k, sos_k), _with_sos(v, sos_v)  # (B, 1 + M, H, D)
    scores = torch.einsum("bqhd,bshd->bqhs", q, keys) / math.sqrt(q.shape[-1])
    m = q.shape[1]
    hidden = torch.ones(m, m + 1, dtype=torch.bool, device=q.device).triu(2)  # row m sees SOS and 0..m
    weights = scores.masked_fill(hidden[:, None, :], -math.inf).softmax(dim=-1)
    return torch.einsum("bqhs,bshd->bqhd", weights, values)


def _attend_nodes(
    q: Tensor, k: Tensor, v: Tensor, sos_k: Tensor, sos_v: Tensor, m: int, path: Tensor
) -> Tensor:
    absent = path < 0  # (Q, P)
    above = path.clamp(min=0) + m
    prefix_scores = torch.einsum("bqhd,bshd->bqhs", q, _with_sos(k[:, :m], sos_k))
    path_scores = torch.einsum("bqhd,bqphd->bqhp", q, k[:, above])
    path_scores = path_scores.masked_fill(absent[:, None, :], -math.inf)
    scores = torch.cat([prefix_scores, path_scores], dim=-1) / math.sqrt(q.shape[-1])
    prefix_weights, path_weights = scores.softmax(dim=-1).split([1 + m, path.shape[1]], dim=-1)
    from_prefix = torch.einsum("bqhs,bshd->bqhd", prefix_weights, _with_sos(v[:, :m], sos_v))
    return from_prefix + torch.einsum("bqhp,bqphd->bqhd", path_weights, v[:, above])


def _with_sos(rows: Tensor, sos: Tensor) -> Tensor:
    """(B, M, H, D) context rows with the SOS row (H, D) in front."""
    return torch.cat([sos.to(rows.dtype).expand(rows.shape[0], 1, -1, -1), rows], dim=1)
