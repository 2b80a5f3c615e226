"""What a training step and an inference pass compute and allocate: products, row kernels, rows, FLOPs, bytes.

The engine is asked itself: its tower goes through a pass over meta tensors, with operations that only note what they
are given. The reference's way is counted from its shapes. A multiply-add is two FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine, TextWeights
from cocoop_fast.engine.constants import TowerConstants, compute_constants
from cocoop_fast.engine.fused_tower import PassBytes, shape_pass
from cocoop_fast.kernels.tree_attention_plan import AttentionPlan, plan_attention
from cocoop_fast.measure.sizes import RowCounts, TowerSizes
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.shapes import Layout, ShapeLinear, ShapeOps
from cocoop_fast.ops.table import AttentionInputs
from cocoop_fast.prompts.tree import ClassTree


@dataclass(frozen=True)
class Product:
    """(rows, inner) activations times a frozen (inner, columns) weight."""

    rows: int
    inner: int
    columns: int
    backward: bool = False  # an input gradient: the weight is read the other way
    fused: bool = (
        False  # with the MLP's activation behind it, or in backward its derivative: a GPU launches both
    )
    calls: int = 1

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


class CountingOps(ShapeOps):
    """Operations that note what they are given."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.operations: list[Operation] = []

    def note(self, kind: str, elements: float, flops: float = 0.0, calls: int = 1) -> None:
        self.operations.append(RowKernel(kind, elements, flops, calls))

    def frozen_linear(self, layer: Affine, *, packed: bool) -> CountingLinear:
        columns, inner = layer.weight.shape
        return CountingLinear(super().frozen_linear(layer, packed=packed).packed_bytes, columns, inner, self)

    def tree_attention(
        self, tree: ClassTree, queries: Tensor | None, device: torch.device
    ) -> CountingAttention:
        return CountingAttention(tree, queries is not None, self)

    def layer_norm_fwd(self, x: Tensor, bias: Tensor | None, *others: Any) -> None:
        self.note("layer_norm_fwd", x.numel() * (2.0 if bias is None else 4.0))  # x, residual; x, y

    def layer_norm_bwd(self, dy: Tensor, *others: Any, accumulate: bool) -> None:
        self.note("layer_norm_bwd", dy.numel() * (4.0 if accumulate else 3.0))  # dy, x, dx; dx

    def assemble_prompts_fwd(
        self, vectors: Tensor | None, shift: Tensor, position: Tensor, *others: Any
    ) -> None:
        self.note("assemble_prompts_fwd", 3.0 * len(shift) * position.numel())

    def assemble_prompts_bwd(self, dx: Tensor, *others: Any) -> None:
        self.note("assemble_prompts_bwd", 2.0 * dx.numel())

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        self.note("move_rows", 2.0 * out.numel())

    def add_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        self.note("move_rows", 3.0 * x.numel())


class CountingLinear(ShapeLinear):
    """Notes its products, and the LayerNorm behind one."""

    def __init__(self, packed_bytes: int, columns: int, inner: int, ops: CountingOps) -> None:
        super().__init__(packed_bytes)
        self.columns, self.inner, self.ops = columns, inner, ops

    def _product(self, x: Tensor, *, backward: bool = False, fused: bool = False) -> None:
        inner, columns = (self.columns, self.inner) if backward else (self.inner, self.columns)
        self.ops.operations.append(Product(len(x), inner, columns, backward, fused))

    def forward(self, x: Tensor, out: Tensor) -> None:
        self._product(x)

    def forward_norm(self, x: Tensor, residual: Tensor, out: Tensor, *others: Any) -> None:
        self._product(x)
        self.ops.layer_norm_fwd(out, residual)

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None:
        self._product(x, fused=True)

    def backward(self, dy: Tensor, dx: Tensor) -> None:
        self._product(dy, backward=True)

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
        self._product(dy, backward=True, fused=True)


class CountingAttention:
    """Notes attention over a tree, of all rows or of the leaves alone."""

    def __init__(self, tree: ClassTree, leaves_alone: bool, ops: CountingOps) -> None:
        self.counts, self.leaves_alone, self.ops = RowCounts.of(tree), leaves_alone, ops

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        return 0  # memory is counted apart

    def forward(self, inputs: AttentionInputs, o: Tensor) -> None:
        self.ops.operations.append(
            attention_kernel(self.counts, len(o), o.shape[-1], leaves_alone=self.leaves_alone)
        )

    def backward(self, grad_o: Tensor, *others: Any, **options: Any) -> None:
        batch, _, width = grad_o.shape
        forward = attention_kernel(self.counts, batch, width, leaves_alone=self.leaves_alone)
        self.ops.operations.append(gradient_of(forward))


def attention_kernel(counts: RowCounts, batch: int, width: int, *, leaves_alone: bool) -> RowKernel:
    """Attention of one layer, of all rows or, in the last layer, of the leaves alone."""
    kind = "leaf_attention_fwd" if leaves_alone else "tree_attention_fwd"
    queries, pairs = (counts.leaves, counts.leaf_pairs) if leaves_alone else (counts.rows, counts.pairs)
    elements = batch * width * (2.0 * counts.rows + 2.0 * queries)  # keys and values; queries and results
    return RowKernel(kind, elements, flops=4.0 * width * batch * pairs)


class GpuLayout:
    """How the Triton backend arranges things, known without Triton."""

    PANEL_ROWS: int | None = None
    ROW_PADDING: int = 0

    def packed_bytes(self, columns: int, inner: int) -> int:
        return 0

    def tree_attention(self, tree: ClassTree, queries: Tensor | None, device: torch.device) -> AttentionPlan:
        return plan_attention(tree, queries, device)


def layout_on(device_type: str) -> Layout:
    """How the engine arranges things on a kind of device: "cpu" or "cuda"."""
    return cpu if device_type == "cpu" and CPP.why_unavailable() is None else GpuLayout()


class TreeCost:
    """The engine over one class tree.

    Args:
        weights: of the text tower, on any device; of the dtype that it will compute in.
        tree: the class tree.
        layout: the backend's.
    """

    def __init__(self, weights: TextWeights, tree: ClassTree, layout: Layout) -> None:
        self.weights, self.tree, self.layout = weights.to(torch.device("meta")), tree, layout
        self.sizes, self.counts = TowerSizes.of(weights), RowCounts.of(tree)
        self.itemsize = weights.dtype.itemsize

    @cached_property
    def _constants(self) -> TowerConstants:
        with torch.no_grad():
            return compute_constants(self.weights, self.tree)

    def bytes(self, batch: int, *, keeps: bool) -> PassBytes:
        """What a pass over B images allocates."""
        return shape_pass(self._constants, ShapeOps(self.layout), batch, keeps=keeps, largest_panel_only=True)

    def step(self, batch: int) -> PassCost:
        """A training step: forward and backward from the image features to the learned parameters."""
        return self._cost(batch, keeps=True)

    def inference(self, batch: int) -> PassCost:
        """A forward pass that keeps nothing."""
        return self._cost(batch, keeps=False)

    def head_bytes(self, batch: int, *, keeps: bool) -> int:
        """The features of all classes, and with backward the gradients of them and of the leaves'."""
        features = batch * self.sizes.embed_dim * self.itemsize
        return features * (2 * self.counts.classes + self.counts.leaves if keeps else self.counts.classes)

    def activation_bytes(self, batch: int, *, keeps: bool) -> int:
        """Everything of activation size that lives at a pass's peak."""
        return self.bytes(batch, keeps=keeps).activations + self.head_bytes(batch, keeps=keeps)

    @cached_property
    def class_list_bytes(self) -> int:
        """What is made once from the model and the class names: constants of layer 0, copies of weights."""
        found = self.bytes(1, keeps=False)
        return found.constants + found.packed

    def _cost(self, batch: int, *, keeps: bool) -> PassCost:
        ops = CountingOps(self.layout)
        shape_pass(self._constants, ops, batch, keeps=keeps)
        projection = Product(batch * self.counts.leaves, self.sizes.width, self.sizes.embed_dim)
        head = head_kernel(self.sizes, self.counts, batch)
        around: list[Operation] = [learner_kernel(self.sizes, batch), projection, head]
        if keeps:
            around += [gradient_of(one) for one in reversed(around)]
        return PassCost(
            rows=batch * self.counts.rows,
            operations=(*ops.operations, *around),
            activation_bytes=self.activation_bytes(batch, keeps=keeps),
            saved_bytes=self.bytes(batch, keeps=keeps).saved,
            itemsize=self.itemsize,
        )


def linear_flops(sizes: TowerSizes, rows: int, *, last_rows: int | None = None, projected: int = 0) -> float:
    """FLOPs of a forward pass's linear layers, nothing skipped but what is said.

    Args:
        sizes: the text tower.
        rows: R.
        last_rows: Q, rows with a query, an attention output and an MLP in the last layer; default R.
        projected: rows that go through the text projection.
    """
    d, last_rows = sizes.width, rows if last_rows is None else last_rows
    behind_keys = 2 * d * d + 2 * d * sizes.mlp_width  # query, attention's output, the MLP
    of_layers = sizes.layers * rows * 2 * d * d + ((sizes.layers - 1) * rows + last_rows) * behind_keys
    return 2.0 * (of_layers + projected * d * sizes.embed_dim)


def dense_step(sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int) -> PassCost:
    """The same step as the reference writes it: K prompts of L tokens an image, one image after another.

    Every image's graph is kept until the loss of all is there.
    """
    forward = tuple(_dense_forward(sizes, counts, batch))
    rows = batch * counts.classes * sizes.context_length
    saved = rows * sizes.layers * sum(_DENSE_SAVED.values()) * sizes.width * itemsize
    return PassCost(
        rows=rows,
        operations=forward + tuple(_dense_backward(forward)),
        # At the peak, the MLP's backward on top.
        activation_bytes=saved + rows // batch * 12 * sizes.width * itemsize,
        saved_bytes=saved,
        itemsize=itemsize,
    )


def dense_inference(sizes: TowerSizes, counts: RowCounts, batch: int, itemsize: int) -> PassCost:
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


def learner_bytes(sizes: TowerSizes, counts: RowCounts, itemsize: int) -> int:
    """The reference's buffers ``token_prefix`` and ``token_suffix``: all prompts, without their context."""
    return counts.classes * (sizes.context_length - counts.context) * sizes.width * itemsize


def gradient_of(op: Operation) -> Operation:
    """The backward of an operation: a product's input gradient, a kernel's own."""
    if isinstance(op, Product):
        return replace(op, inner=op.columns, columns=op.inner, backward=True)
    elements, flops, calls = _BACKWARD_OF.get(op.kind, (1.0, 2.0, 1))
    kind = op.kind.replace("_fwd", "_bwd")
    return RowKernel(kind, elements * op.elements, flops * op.flops, calls * op.calls)


# Of a kernel's backward over its forward: elements, FLOPs, launches. Attention computes the scores again, has two
# products for each of forward's, and sums partial results in a kernel of its own.
_BACKWARD_OF = {
    "attention_fwd": (7 / 4, 2.5, 1),
    "tree_attention_fwd": (7 / 4, 2.5, 2),
    "leaf_attention_fwd": (7 / 4, 2.5, 2),
}


def learner_kernel(sizes: TowerSizes, batch: int) -> RowKernel:
    """The Meta-Net, E to E/16 to d. A few launches of a few thousand weights."""
    weights = sizes.embed_dim * (sizes.embed_dim // 16) + (sizes.embed_dim // 16) * sizes.width
    return RowKernel("learner_fwd", float(weights + batch * (sizes.embed_dim + 2 * sizes.width)), calls=3)


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
    d, wide, prompts = sizes.width, sizes.mlp_width, counts.classes
    rows = prompts * sizes.context_length
    calls = batch * sizes.layers
    yield learner_kernel(sizes, batch)
    for inner, columns in ((d, 3 * d), (d, d), (d, wide), (wide, d)):
        yield Product(rows, inner, columns, calls=calls)
    flops = 4.0 * d * rows * sizes.context_length * calls
    yield RowKernel("attention_fwd", 4.0 * rows * d * calls, flops, calls)
    moved = sum(forward for forward, _ in _DENSE_ROW_OPERATIONS.values())
    yield RowKernel("eager_fwd", float(moved * rows * d * calls), calls=calls * _DENSE_LAUNCHES)
    assembled = RowKernel("eager_fwd", 2.0 * rows * d * batch, calls=3 * batch)
    yield assembled  # prompts put together, positions added
    yield Product(prompts, d, sizes.embed_dim, calls=batch)
    yield head_kernel(sizes, counts, batch)


def _dense_backward(forward: tuple[Operation, ...]) -> Iterator[Operation]:
    ratio = [sum(column) for column in zip(*_DENSE_ROW_OPERATIONS.values(), strict=True)]
    for op in map(gradient_of, reversed(forward)):
        if isinstance(op, RowKernel) and op.kind == "eager_bwd":
            yield RowKernel(op.kind, op.elements * ratio[1] / ratio[0], calls=2 * op.calls)
        else:
            yield op
