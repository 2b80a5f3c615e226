"""The text transformer over tree rows in plain torch operations: the readable twin of every faster tower.

Runs on any device and in any float type, serves trees of every layout, and deep prompts; autograd derives its
backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cocoop_fast.engine.constants import TowerConstants, finish_block, project, qkv_rows
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.memory import PassSize, PeakBytes, undisturbed
from cocoop_fast.ops.path_attention import path_attention_ref
from cocoop_fast.ops.tree_attention import tree_attention_ref
from cocoop_fast.prompts.tree import ClassTree, RowPaths


class TorchTower:
    """Contexts to the features of the K' distinct prompts.

    S context vectors of a context: M, or K M if each class has its own.

    Args:
        constants: what the model and the class tree fix.
    """

    kept_bytes = pooled_bytes = 0
    ops = None  # torch's own

    def __init__(self, constants: TowerConstants) -> None:
        self.constants = constants

    def for_part(self, constants: TowerConstants) -> TorchTower:
        """A tower of the same weights for another tree."""
        return TorchTower(constants)

    def release(self) -> None:
        """Nothing is kept between passes."""

    def pass_size(self, trees: Sequence[ClassTree], batch: int, *, keeps: bool) -> PassSize:
        """What passes over B images allocate, one tree after the other; found by passes over meta tensors."""
        return undisturbed(
            lambda: PassSize.most([_pass_size(self.constants.on_meta(tree), batch, keeps) for tree in trees])
        )

    def encode(self, contexts: ContextRows) -> Tensor:
        """To (B, K', E) text features of the tree's leaves."""
        ctx, deep = contexts.sum(), contexts.deep
        c = self.constants
        w, batch = c.weights, ctx.shape[0]  # not len, which fixes it in a traced graph
        context_rows = self._learnable_rows(ctx) + c.positions
        x = self._weave(context_rows, c.node_rows.expand(batch, -1, -1))  # (B, R, d)
        last = len(w.blocks) - 1
        for layer, block in enumerate(w.blocks):
            # After the last layer only the EOT rows are read.
            rows = None if layer < last else c.tree.n_ctx + c.leaves
            if layer == 0:  # the tokens' query, key and value do not depend on the context
                parts = zip(qkv_rows(context_rows, block, w.heads), c.node_qkv, strict=True)
                q, k, v = (self._weave(own, same.expand(batch, -1, -1, -1)) for own, same in parts)
                q = q if rows is None else q[:, rows]
            else:
                if layer <= len(deep):
                    x = x.index_copy(1, c.learnable, self._learnable_rows(deep[layer - 1]))
                q, k, v = qkv_rows(x, block, w.heads, query_rows=rows)
            x = x if rows is None else x[:, rows]
            o = self._attend(q, k, v, layer, leaves=rows is not None)
            x = finish_block(x, o, block, w.activation)
        return project(x, w)

    def _learnable_rows(self, ctx: Tensor) -> Tensor:
        """(B, S, d) context vectors to the rows that hold them."""
        c = self.constants
        return (ctx if c.tree.is_standard else ctx[:, c.slots]).to(c.weights.dtype)

    def _weave(self, learnable: Tensor, tokens: Tensor) -> Tensor:
        """The learnable rows and the token rows, (B, S, ...) and (B, T, ...), in the order of the tree."""
        rows = torch.cat([learnable, tokens], dim=1)
        return rows if self.constants.tree.is_standard else rows[:, self._order]

    @cached_property
    def _order(self) -> Tensor:
        """(R,) place of each row of the tree among the learnable rows followed by the tokens."""
        tree = self.constants.tree
        is_token = torch.cat([torch.zeros(tree.n_ctx, dtype=torch.bool), tree.slot < 0])
        order = torch.cat([(~is_token).nonzero()[:, 0], is_token.nonzero()[:, 0]]).argsort()
        return order.to(self.constants.weights.device)

    @cached_property
    def _paths(self) -> RowPaths:
        return self.constants.tree.row_paths.to(self.constants.weights.device)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, *, leaves: bool) -> Tensor:
        c = self.constants
        if c.tree.is_standard:
            return tree_attention_ref(q, k, v, *c.sos_kv[layer], c.tree, c.leaves if leaves else None)
        return path_attention_ref(q, k, v, *c.fixed_kv[layer], self._paths, leaves)


def _pass_size(constants: TowerConstants, batch: int, keeps: bool) -> PassSize:
    """The features are counted among what it allocates."""
    kept = constants.nbytes
    context = torch.empty(batch, len(constants.slots), constants.weights.width, device="meta")
    with PeakBytes() as peak, torch.set_grad_enabled(keeps):
        features = TorchTower(constants).encode(ContextRows(None, context.requires_grad_(keeps)))
        if keeps:
            features.backward(torch.empty_like(features))
    return PassSize(pooled=0, passing=peak.bytes, constants=kept)
