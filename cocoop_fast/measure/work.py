"""How much a contestant has to do: rows, FLOPs of the matrix multiplications, bytes kept for backward.

Counted by :mod:`cocoop_fast.measure.cost`. R rows, Q rows that are asked for after the last layer. A multiply-add is two
FLOPs. The weights are frozen, so backward has one multiplication per forward one: a step is twice a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from cocoop_fast.clip.frozen import TextWeights
from cocoop_fast.measure.buffers import LayerRows, saved_bytes
from cocoop_fast.measure.cost import Product, layer_products, tree_inference
from cocoop_fast.measure.sizes import RowCounts, TowerSizes
from cocoop_fast.prompts.tree import ClassTree


@dataclass(frozen=True)
class Work:
    """What one forward pass over the whole batch takes."""

    rows: int  # rows that go through the layers
    forward_flops: float  # of its matrix multiplications; attention is left out (below 1 percent)
    saved_bytes: float = 0.0  # expected activations kept for backward, for deciding what fits

    @property
    def step_flops(self) -> float:
        return 2 * self.forward_flops


def gemm_flops(weights: TextWeights, rows: int, *, last_rows: int | None = None, projected: int = 0) -> float:
    """FLOPs of the linear layers in a forward pass.

    Args:
        weights: the text tower.
        rows: R.
        last_rows: Q, rows with a query, an attention output and an MLP in the last layer; default R.
        projected: rows that go through the text projection.
    """
    sizes, asking = TowerSizes.of(weights), rows if last_rows is None else last_rows
    blocks = [LayerRows(rows, rows, rows)] * (sizes.layers - 1) + [LayerRows(rows, asking, asking)]
    products = [product for block in blocks for product in layer_products(sizes, block)]
    products.append(Product(projected, sizes.width, sizes.embed_dim))
    return sum(product.flops for product in products)


def tree_flops(weights: TextWeights, tree: ClassTree, batch: int) -> float:
    """FLOPs of the tree with all that is skipped: layer 0's constants, and all but the EOT rows in the last."""
    return tree_inference(TowerSizes.of(weights), RowCounts.of(tree), batch).gemm_flops


def saved_by_engine(weights: TextWeights, tree: ClassTree, batch: int) -> float:
    """Bytes per step that the engine keeps for backward."""
    return float(saved_bytes(TowerSizes.of(weights), RowCounts.of(tree), batch))
