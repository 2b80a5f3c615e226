"""The text transformer over tree rows in plain torch operations: the readable twin of every faster tower.

Runs on any device and in any float type; autograd derives its backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cocoop_fast.ops.tree_attention import tree_attention_ref
from cocoop_fast.tower_rows import TowerConstants, finish_block, project, qkv_rows


class TorchTower:
    """(B, M, d) contexts to the features of the K' distinct prompts.

    Args:
        constants: what the model and the class list fix.
    """

    def __init__(self, constants: TowerConstants) -> None:
        self.constants = constants

    def encode(self, ctx: Tensor) -> Tensor:
        """(B, M, d) contexts to (B, K', E) text features of the tree's leaves."""
        c = self.constants
        w, m, batch = c.weights, c.tree.n_ctx, len(ctx)
        context_rows = ctx.to(w.dtype) + c.positions
        x = torch.cat([context_rows, c.node_rows.expand(batch, -1, -1)], dim=1)  # (B, R, d)
        last = len(w.blocks) - 1
        for layer, block in enumerate(w.blocks):
            rows = None if layer < last else m + c.leaves  # after the last layer only the EOT rows are read
            if layer == 0:  # the nodes' query, key and value do not depend on the image
                parts = zip(qkv_rows(context_rows, block, w.heads), c.node_qkv, strict=True)
                q, k, v = (torch.cat([own, same.expand(batch, -1, -1, -1)], dim=1) for own, same in parts)
                q = q if rows is None else q[:, rows]
            else:
                q, k, v = qkv_rows(x, block, w.heads, query_rows=rows)
            x = x if rows is None else x[:, rows]
            o = tree_attention_ref(q, k, v, *c.sos_kv[layer], c.tree, None if rows is None else c.leaves)
            x = finish_block(x, o, block, w.activation)
        return project(x, w)
