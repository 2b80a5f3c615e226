"""What a training step and an inference pass compute: products, row kernels, rows, FLOPs, bytes. Pure functions.

A multiply-add is two FLOPs. The weights are frozen, so backward has one product for every product of forward, of the
same size. Attention's FLOPs are counted with the attention kernels: they are below one percent of the tree's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from cocoop_fast.measure import buffers
from cocoop_fast.measure.buffers import FLOAT_BYTES, LayerRows, layer_rows
from cocoop_fast.measure.sizes import RowCounts, TowerSizes


@dataclass(frozen=True)
class Product:
    """(rows, inner) activations times a frozen (inner, columns) weight."""

    rows: int
    inner: int
    columns: int
    backward: bool = False  # an input gradient: the weight is read the other way
    activation: Literal["none", "of output", "of input"] = "none"  # where the MLP's activation is
    calls: int = 1

    @property
    def fused(self) -> bool:
        """Whether the activation, or in backward its derivative, is done with it. A kernel of its own on a GPU."""
        return self.activation == ("of input" if self.backward else "of output")

    @property
    def launches(self) -> int:
        """Kernels of all calls."""
        return self.calls * (2 if self.fused else 1)

    @property
    def flops(self) -> float:
        """Of all calls."""
        return 2.0 * self.calls * self.rows * self.inner * self.columns

    @property
    def elements(self) -> float:
        """Read and written by all calls: both factors and the result; with an activation, what it is of as well."""
        results = self.rows * self.columns * (2 if self.fused else 1)
        return float(self.calls * (self.rows * self.inner + self.inner * self.columns + results))


@dataclass(frozen=True)
class RowKernel:
    """An operation that reads and writes rows and multiplies by no weight."""

    kind: str
    elements: float  # read and written by all calls
    flops: float = 0.0  # of attention; those of the others are negligible
    calls: int = 1

    @property
    def launches(self) -> int:
        return self.calls


Operation: TypeAlias = Product | RowKernel


@dataclass(frozen=True)
class PassCost:
    """What one pass over a batch computes and allocates."""

    rows: int  # rows that go through the layers
    operations: tuple[Operation, ...]
    activation_bytes: int  # everything of activation size that lives at the peak
    saved_bytes: int  # of it: kept from forward to backward
    itemsize: int  # bytes of an element

    @property
    def gemm_flops(self) -> float:
        return sum(op.flops for op in self.operations if isinstance(op, Product))

    @property
    def flops(self) -> float:
        """GEMMs and attention."""
        return sum(op.flops for op in self.operations)

    @property
    def bytes(self) -> float:
        """Read and written, if every operation reads its inputs from memory and writes its results there."""
        return self.itemsize * sum(op.elements for op in self.operations)

    @property
    def launches(self) -> int:
        """Products, activations and kernels, as a GPU would be given them."""
        return sum(op.launches for op in self.operations)


def tree_step(sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int = FLOAT_BYTES) -> PassCost:
    """A training step of the engine: forward and backward from the image features to the learned parameters."""
    forward = tuple(_tree_forward(sizes, counts, batch))
    saved = buffers.saved_bytes(sizes, counts, batch, itemsize)
    scratch = buffers.scratch_bytes(sizes, counts, batch, itemsize)
    head = buffers.head_bytes(sizes, counts, batch, itemsize)
    return PassCost(
        rows=batch * counts.rows,
        operations=forward + tuple(_backward(forward)),
        activation_bytes=saved + scratch + head,
        saved_bytes=saved,
        itemsize=itemsize,
    )


def tree_inference(sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int = FLOAT_BYTES) -> PassCost:
    """A forward pass of the engine that keeps nothing."""
    scratch = buffers.scratch_bytes(sizes, counts, batch, itemsize, keeps=False)
    head = buffers.head_bytes(sizes, counts, batch, itemsize) // 2
    return PassCost(
        rows=batch * counts.rows,
        operations=tuple(_tree_forward(sizes, counts, batch)),
        activation_bytes=scratch + head,
        saved_bytes=0,
        itemsize=itemsize,
    )


def dense_step(sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int = FLOAT_BYTES) -> PassCost:
    """The same step as the reference writes it: K prompts of L tokens an image, one image after another.

    Every image's graph is kept until the loss of all is there.
    """
    forward = tuple(_dense_forward(sizes, counts, batch))
    rows = batch * counts.classes * sizes.context_length
    saved = rows * sizes.layers * sum(_DENSE_SAVED.values()) * sizes.width * itemsize
    return PassCost(
        rows=rows,
        operations=forward + tuple(_dense_backward(forward)),
        activation_bytes=saved
        + rows // batch * 12 * sizes.width * itemsize,  # the MLP's backward at the peak
        saved_bytes=saved,
        itemsize=itemsize,
    )


def dense_inference(
    sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int = FLOAT_BYTES
) -> PassCost:
    """A forward pass as the reference writes it: all images' prompts are assembled first, then encoded in turn."""
    rows = batch * counts.classes * sizes.context_length
    assembled = rows * sizes.width * itemsize
    return PassCost(
        rows=rows,
        operations=tuple(_dense_forward(sizes, counts, batch)),
        activation_bytes=assembled + rows // batch * 14 * sizes.width * itemsize,
        saved_bytes=0,
        itemsize=itemsize,
    )


def layer_products(sizes: TowerSizes, rows: LayerRows) -> Iterator[Product]:
    """The linear layers of one block: query, key and value; attention's output; the MLP."""
    d, wide = sizes.width, sizes.mlp_width
    if rows.queries == rows.keys:
        yield Product(rows.keys, d, 3 * d)
    else:
        yield Product(rows.keys, d, 2 * d)
        if rows.queries:
            yield Product(rows.queries, d, d)
    yield Product(rows.asking, d, d)
    yield Product(rows.asking, d, wide, activation="of output")
    yield Product(rows.asking, wide, d, activation="of input")


def attention_kernel(sizes: TowerSizes, counts: RowCounts, batch: int, *, leaves_alone: bool) -> RowKernel:
    """Attention of one layer: all rows ask, or in the last layer the leaves alone."""
    kind = "leaf_attention_fwd" if leaves_alone else "tree_attention_fwd"
    asking, pairs = (counts.leaves, counts.leaf_pairs) if leaves_alone else (counts.rows, counts.pairs)
    elements = (
        batch * sizes.width * (2.0 * counts.rows + 2.0 * asking)
    )  # keys and values; queries and results
    return RowKernel(kind, elements, flops=4.0 * sizes.width * batch * pairs)


def _tree_forward(sizes: TowerSizes, counts: RowCounts, batch: int) -> Iterator[Operation]:
    d, leaves = sizes.width, batch * counts.leaves
    yield learner_kernel(sizes, batch)
    for layer in range(sizes.layers):
        rows = layer_rows(sizes, counts, batch, layer)
        last = layer == sizes.layers - 1
        normed = rows.keys + rows.asking + (rows.queries if rows.queries != rows.keys else 0)
        yield RowKernel("layer_norm_fwd", 3.0 * normed * d, calls=2 + (rows.queries not in (0, rows.keys)))
        yield from layer_products(sizes, rows)
        yield attention_kernel(sizes, counts, batch, leaves_alone=last)
        if layer == 0 or last:
            yield RowKernel("copy", 2.0 * rows.asking * d)  # the residual is gathered
    yield RowKernel("layer_norm_fwd", 3.0 * leaves * d)
    yield Product(leaves, d, sizes.embed_dim)
    yield head_kernel(sizes, counts, batch)


def _backward(forward: tuple[Operation, ...]) -> Iterator[Operation]:
    for op in reversed(forward):
        yield gradient_of(op)


def gradient_of(op: Operation) -> Operation:
    """The backward of an operation: a product's input gradient, a kernel's own."""
    if isinstance(op, Product):
        return replace(op, inner=op.columns, columns=op.inner, backward=True)
    elements, flops = _BACKWARD_OF.get(op.kind, (1.0, 2.0))
    kind = op.kind.replace("_fwd", "_bwd")
    return RowKernel(kind, elements * op.elements, flops * op.flops, op.calls)


# Of a kernel's backward over its forward: elements and FLOPs. LayerNorm reads dy, x and dx and writes dx; attention
# computes the scores again and has two products for each of forward's.
_BACKWARD_OF = {
    "layer_norm_fwd": (4 / 3, 1.0),
    "attention_fwd": (7 / 4, 2.5),
    "tree_attention_fwd": (7 / 4, 2.5),
    "leaf_attention_fwd": (7 / 4, 2.5),
}


def learner_kernel(sizes: TowerSizes, batch: int) -> RowKernel:
    """The Meta-Net, E to E/16 to d, and the contexts. A few launches of a few thousand weights."""
    weights = sizes.embed_dim * (sizes.embed_dim // 16) + (sizes.embed_dim // 16) * sizes.width
    return RowKernel("learner_fwd", float(weights + batch * (sizes.embed_dim + 2 * sizes.width)), calls=4)


def head_kernel(sizes: TowerSizes, counts: RowCounts, batch: int) -> RowKernel:
    """Features of the classes from those of the leaves, cosines, cross-entropy."""
    elements = batch * (counts.leaves + 2 * counts.classes) * sizes.embed_dim
    return RowKernel("head_fwd", float(elements), calls=3)


# Elements in units of (rows, d) that autograd keeps of one block of the reference: frozen linear layers keep nothing.
_DENSE_SAVED = {
    "input of LayerNorm 1": 1,
    "query, key, value": 3,
    "output of attention": 1,
    "input of LayerNorm 2": 1,
    "MLP pre-activation": 4,
    "its sigmoid": 4,
}

# Elements in units of (rows, d) that the operations between a reference block's products read and write, each
# operation by itself as eager PyTorch runs them: (forward, backward).
_DENSE_ROW_OPERATIONS = {
    "LayerNorm, two": (4, 10),
    "query, key, value made contiguous": (6, 6),
    "residual additions, two": (6, 6),
    "QuickGELU: scale, sigmoid, product": (28, 56),
}
_DENSE_LAUNCHES = 9  # of them, forward


def _dense_forward(sizes: TowerSizes, counts: RowCounts, batch: int) -> Iterator[Operation]:
    d, prompts = sizes.width, counts.classes
    rows = prompts * sizes.context_length
    calls = batch * sizes.layers
    block = LayerRows(keys=rows, queries=rows, asking=rows)
    yield learner_kernel(sizes, batch)
    for product in layer_products(sizes, block):
        yield Product(product.rows, product.inner, product.columns, calls=calls)
    flops = 4.0 * d * rows * sizes.context_length * calls
    yield RowKernel("attention_fwd", 4.0 * rows * d * calls, flops, calls)
    moved = sum(forward for forward, _ in _DENSE_ROW_OPERATIONS.values())
    yield RowKernel("eager_fwd", float(moved * rows * d * calls), calls=calls * _DENSE_LAUNCHES)
    yield RowKernel(
        "eager_fwd", 2.0 * rows * d * batch, calls=3 * batch
    )  # prompts assembled, positions added
    yield Product(prompts, d, sizes.embed_dim, calls=batch)
    yield head_kernel(sizes, counts, batch)


def _dense_backward(forward: tuple[Operation, ...]) -> Iterator[Operation]:
    ratio = [sum(column) for column in zip(*_DENSE_ROW_OPERATIONS.values(), strict=True)]
    for op in _backward(forward):
        if isinstance(op, RowKernel) and op.kind == "eager_bwd":
            yield RowKernel(op.kind, op.elements * ratio[1] / ratio[0], calls=2 * op.calls)
        else:
            yield op
