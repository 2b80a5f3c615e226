"""What a pass of the engine allocates, buffer by buffer: the shapes of ``cpu_tower``, with nothing allocated.

Saved buffers live from forward to backward, one set a layer. Scratch buffers serve all layers in turn, and each is as
large as its largest use. Sizes are in elements unless they say bytes; LayerNorm statistics are float32 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from cocoop_fast.engine.cpu_tower import PANEL_ROWS, ROW_PADDING
from cocoop_fast.measure.sizes import CHUNK_ROWS, RowCounts, TowerSizes
from cocoop_fast.ops.cpu import PANEL_COLUMNS

FLOAT_BYTES = 4


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer, over the whole batch."""

    keys: int  # rows whose key and value are computed
    queries: int  # rows whose query is computed
    asking: int  # rows with an attention output and an MLP

    @property
    def qkv_columns(self) -> int:
        """Query, key and value lie side by side where all rows ask: 3. In the last layer key and value do: 2."""
        return 3 if self.queries == self.keys else 2


def layer_rows(sizes: TowerSizes, counts: RowCounts, batch: int, layer: int) -> LayerRows:
    """Layer 0's nodes are constants up to query, key and value; the last layer's EOT rows alone are read."""
    first, last = layer == 0, layer == sizes.layers - 1
    rows, leaves = batch * counts.rows, batch * counts.leaves
    keys = batch * counts.context if first else rows
    queries = (0 if first else leaves) if last else keys
    return LayerRows(keys, queries, leaves if last else rows)


def panel(rows: int) -> int:
    """The rows that go together from one attention to the next, at most."""
    return ceil(rows / max(1, round(rows / PANEL_ROWS)))


def saved_bytes(sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int = FLOAT_BYTES) -> int:
    """Bytes kept for backward: in a middle layer 9d elements a row and the LayerNorm statistics."""
    d, wide = sizes.width, sizes.mlp_width
    elements = batch * counts.leaves * d  # the EOT rows before the final LayerNorm
    statistics = 2 * batch * counts.leaves
    for layer in range(sizes.layers):
        rows = layer_rows(sizes, counts, batch, layer)
        elements += rows.keys * d + rows.keys * rows.qkv_columns * d  # x; q, k, v
        elements += rows.asking * (d + wide)  # the middle of the block, the MLP's pre-activation
        statistics += 2 * (rows.keys + rows.asking)
        if layer == sizes.layers - 1:
            elements += rows.queries * d
            statistics += 2 * rows.asking
    return elements * itemsize + statistics * FLOAT_BYTES


def scratch_bytes(
    sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int = FLOAT_BYTES, *, keeps: bool = True
) -> int:
    """Bytes of the buffers that all layers share.

    Args:
        sizes, counts: the tower and the tree.
        batch: B.
        itemsize: bytes of an element.
        keeps: whether backward will come. If not, the activations of a layer are scratch as well.
    """
    d, wide = sizes.width, sizes.mlp_width
    layers = [layer_rows(sizes, counts, batch, layer) for layer in range(sizes.layers)]
    leaves, last = batch * counts.leaves, layers[-1]
    asking = max(rows.asking for rows in layers)
    most = max(rows.keys for rows in layers)
    qkv = [(rows.keys, rows.qkv_columns * d) for rows in layers]
    elements = {
        "o": padded(asking, d),
        "h": padded(max(leaves, panel(asking), panel(most)), d),  # LayerNorm's output, or its gradient
        "g": padded(panel(asking), wide),
    }
    if keeps:
        elements |= {
            "grad_x_leaf": padded(leaves, d),
            "grad_qkv": max(padded(*shape) for shape in qkv),
            "attention": attention_workspace(sizes, counts, batch),
        }
        if sizes.layers > 1:
            elements |= {"grad_q": last.queries * d, "grad_x": padded(most, d)}
    else:
        elements |= {
            "x_ctx": layers[0].keys * d,
            "x_leaf": leaves * d,
            "qkv": max(rows * columns for rows, columns in qkv),
        }
        if sizes.layers > 1:
            elements |= {"x": most * d, "q": last.queries * d}
    return sum(elements.values()) * itemsize


def padded(rows: int, width: int) -> int:
    """Elements of a matrix that a linear layer reads."""
    return rows * (width + ROW_PADDING)


def attention_workspace(sizes: TowerSizes, counts: RowCounts, batch: int) -> int:
    """Probabilities, score gradients, and partial sums of the context keys' gradients."""

    def elements(pairs: int, chunks: int) -> int:
        return batch * (2 * pairs * sizes.heads + 2 * chunks * counts.context * sizes.width)

    whole = elements(counts.pairs, 1 + ceil(counts.nodes / CHUNK_ROWS))
    leaves = elements(counts.leaf_pairs, ceil(counts.leaves / CHUNK_ROWS))
    return leaves if sizes.layers == 1 else max(whole, leaves)


def head_bytes(sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int = FLOAT_BYTES) -> int:
    """Text features of the distinct prompts and of all classes, and in backward the gradients of both."""
    return 2 * batch * (counts.leaves + counts.classes) * sizes.embed_dim * itemsize


def constant_bytes(sizes: TowerSizes, counts: RowCounts, itemsize: int = FLOAT_BYTES) -> int:
    """Layer 0's input, query, key and value of the nodes, made once from a model and a class list."""
    return 4 * counts.nodes * sizes.width * itemsize


def packed_bytes(sizes: TowerSizes) -> int:
    """The copies of the weights that the CPU's kernels read in forward, in float32."""
    d, wide = sizes.width, sizes.mlp_width

    def packed(columns: int, inner: int) -> int:
        return ceil(columns / PANEL_COLUMNS) * PANEL_COLUMNS * inner

    block = packed(d, d) + packed(wide, d) + packed(d, wide)
    qkv = max(0, sizes.layers - 2) * packed(3 * d, d)
    return FLOAT_BYTES * ((sizes.layers - 1) * block + qkv)


def learner_bytes(sizes: TowerSizes, counts: RowCounts, itemsize: int = FLOAT_BYTES) -> int:
    """The reference's buffers ``token_prefix`` and ``token_suffix``: all prompts, without their context."""
    return counts.classes * (sizes.context_length - counts.context) * sizes.width * itemsize
