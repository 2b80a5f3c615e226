"""How much a contestant has to do: rows, FLOPs of the matrix multiplications, bytes kept for backward.

Shapes: d width, R rows, Q rows that are asked for after the last layer. A multiply-add is two FLOPs. The weights
are frozen, so backward has one multiplication per forward one, of the same size: a step is twice a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from cocoop_fast.class_tree import ClassTree
from cocoop_fast.clip import TextWeights


@dataclass(frozen=True)
class Work:
    """What one forward pass over the whole batch takes."""

    rows: int  # rows that go through the layers
    forward_flops: float  # of its matrix multiplications; attention is left out (below 1 percent)
    saved_bytes: float = 0.0  # expected activations kept for backward, for deciding what fits

    @property
    def step_flops(self) -> float:
        return 2 * self.forward_flops


def gemm_flops(
    weights: TextWeights,
    rows: int,
    *,
    first_rows: int | None = None,
    last_rows: int | None = None,
    projected: int = 0,
) -> float:
    """FLOPs of the linear layers in a forward pass.

    Args:
        weights: the text tower.
        rows: R.
        first_rows: rows whose query, key and value are computed in layer 0; default R.
        last_rows: Q, rows with a query, an attention output and an MLP in the last layer; default R.
        projected: rows that go through the text projection.
    """
    total = projected * weights.projection.weight.numel()
    for layer, block in enumerate(weights.blocks):
        last = layer == len(weights.blocks) - 1
        d = block.out_proj.weight.shape[0]
        asking = last_rows if last and last_rows is not None else rows
        attending = first_rows if layer == 0 and first_rows is not None else rows
        total += 2 * d * d * attending + d * d * min(asking, attending)  # key and value; query
        mlp = block.fc.weight.numel() + block.proj.weight.numel()
        total += (block.out_proj.weight.numel() + mlp) * asking
    return 2.0 * total


def tree_flops(weights: TextWeights, tree: ClassTree, batch: int) -> float:
    """FLOPs of the tree with all that is skipped: layer 0's constants, and all but the EOT rows in the last."""
    leaves = batch * len(tree.leaves)
    return gemm_flops(
        weights, batch * tree.rows, first_rows=batch * tree.n_ctx, last_rows=leaves, projected=leaves
    )


def saved_by_engine(weights: TextWeights, tree: ClassTree, batch: int) -> float:
    """Bytes per step that the engine keeps for backward: 9d floats a row and layer, less at both ends."""
    d, layers = weights.width, len(weights.blocks)
    rows, leaves, context = batch * tree.rows, batch * len(tree.leaves), batch * tree.n_ctx
    floats = (layers - 2) * rows * 9 * d + (context * 4 * d + rows * 5 * d) + (rows * 3 * d + leaves * 6 * d)
    return 4.0 * floats
