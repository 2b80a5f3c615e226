"""What a training step and an inference pass compute and allocate: products, row kernels, rows, FLOPs, bytes.

Both ways are asked themselves, over meta tensors, which have shapes and no memory. The engine's tower is given
operations that only note what they are given; of the reference's way every operation of torch is noted.
A multiply-add is two FLOPs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cocoop_fast.clip.frozen import Affine, TextWeights
from cocoop_fast.engine.constants import compute_constants, finish_block, qkv_rows
from cocoop_fast.engine.fused_tower import PassBytes, shape_pass
from cocoop_fast.engine.memory import PeakBytes
from cocoop_fast.kernels.tree_attention_plan import AttentionPlan, plan_attention
from cocoop_fast.ops import cpu
from cocoop_fast.ops.assemble_prompts import assemble_dense_ref
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref
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
    # With the MLP's activation behind it, or in backward its derivative. A GPU launches both, and they are counted apart
    # where that is planned for, see CountingLinear.
    fused: bool = False

    @property
    def launches(self) -> int:
        return 2 if self.fused else 1

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns

    @property
    def elements(self) -> float:
        """Read and written: both factors and the result; with an activation, what it is of as well."""
        results = self.rows * self.columns * (2 if self.fused else 1)
        return float(self.rows * self.inner + self.inner * self.columns + results)


@dataclass(frozen=True)
class RowKernel:
    """An operation that reads and writes rows and multiplies by no weight."""

    kind: str
    elements: float  # read and written
    flops: float = 0.0  # of attention; those of the others are negligible
    launches: int = 1


Operation: TypeAlias = Product | RowKernel


@dataclass(frozen=True)
class PassCost:
    """What one pass over a batch computes and allocates."""

    rows: int  # rows that go through the layers
    operations: Mapping[Operation, int]  # and how often
    activation_bytes: int  # everything of activation size that lives at the peak
    saved_bytes: int  # of it: kept from forward to backward
    itemsize: int  # bytes of an element

    @property
    def gemm_flops(self) -> float:
        return sum(n * op.flops for op, n in self.operations.items() if isinstance(op, Product))

    @property
    def flops(self) -> float:
        """GEMMs and attention."""
        return sum(n * op.flops for op, n in self.operations.items())

    @property
    def bytes(self) -> float:
        """Read and written, if every operation reads its inputs from memory and writes its results there."""
        return self.itemsize * sum(n * op.elements for op, n in self.operations.items())

    @property
    def launches(self) -> int:
        """Products, activations and kernels, as a GPU would be given them."""
        return sum(n * op.launches for op, n in self.operations.items())


@dataclass(frozen=True)
class RowCounts:
    """The rows of one image, and what its attention reads. SOS is a key of every row, and no row."""

    classes: int  # K
    context: int  # M
    nodes: int  # N
    leaves: int  # Q, distinct EOT nodes
    tokens: int  # class tokens of all prompts, EOT included: the nodes if nothing were shared
    longest: int  # tokens of the longest prompt, from SOS to EOT
    pairs: int  # (query, key) pairs of all rows
    leaf_pairs: int  # of the leaves alone

    @classmethod
    def of(cls, tree: ClassTree) -> RowCounts:
        m, depth = tree.n_ctx, tree.depth
        node_keys = depth + m + 2  # SOS, the context, the path down to the node itself
        context_keys = torch.arange(m) + 2
        return cls(
            classes=tree.n_classes,
            context=m,
            nodes=len(tree),
            leaves=len(tree.leaves),
            tokens=int((depth[tree.eot] + 1).sum()),
            longest=1 + m + tree.max_depth,
            pairs=int(node_keys.sum() + context_keys.sum()),
            leaf_pairs=int(node_keys[tree.leaves].sum()),
        )

    @property
    def rows(self) -> int:
        """R = M + N."""
        return self.context + self.nodes


class Cost(ABC):
    """One way to compute a step, or an inference pass, over a class list.

    Args:
        weights: of the text tower, on any device; of the dtype that it will compute in.
        tree: the class tree.
    """

    eager: bool  # launched operation by operation from PyTorch, instead of replayed
    rows: int  # of an image, that go through the layers
    class_list_bytes: int  # what is made once from the model and the class names

    def __init__(self, weights: TextWeights, tree: ClassTree) -> None:
        self.weights = weights.to(torch.device("meta"))
        self.counts = RowCounts.of(tree)
        self.itemsize = weights.dtype.itemsize

    @abstractmethod
    def activation_bytes(self, batch: int, *, keeps: bool) -> int:
        """Everything of activation size that lives at the peak of a pass over B images; `keeps`: with its backward."""

    @abstractmethod
    def saved_bytes(self, batch: int) -> int:
        """Of it: kept from forward to backward."""

    @abstractmethod
    def _of_tower(self, batch: int, *, keeps: bool) -> Counter[Operation]: ...

    def step(self, batch: int) -> PassCost:
        """A training step: forward and backward from the image features to the learned parameters."""
        return self._pass(batch, keeps=True)

    def inference(self, batch: int) -> PassCost:
        """A forward pass that keeps nothing."""
        return self._pass(batch, keeps=False)

    def _pass(self, batch: int, *, keeps: bool) -> PassCost:
        return PassCost(
            rows=batch * self.rows,
            operations=self._of_tower(batch, keeps=keeps) + Counter(self.around(batch, keeps=keeps)),
            activation_bytes=self.activation_bytes(batch, keeps=keeps),
            saved_bytes=self.saved_bytes(batch) if keeps else 0,
            itemsize=self.itemsize,
        )

    def around(self, batch: int, *, keeps: bool) -> list[Operation]:
        """What comes before the tower and after it: the Meta-Net, E to E/16 to d, a few launches of a few thousand
        weights; features of the classes from those of the leaves, cosines, cross-entropy."""
        d, e = self.weights.projection.weight.shape
        learner = (e // 16) * (e + d) + batch * (e + 2 * d)
        head = batch * (self.counts.leaves + 2 * self.counts.classes) * e
        ways = ("fwd", "bwd") if keeps else ("fwd",)
        return [RowKernel(f"around_{way}", float(learner + head), launches=6) for way in ways]


class TreeCost(Cost):
    """The engine over one class tree.

    Args:
        weights, tree: as for :class:`Cost`.
        layout: the backend's.
    """

    eager = False

    def __init__(self, weights: TextWeights, tree: ClassTree, layout: Layout) -> None:
        super().__init__(weights, tree)
        self.rows, self.layout = self.counts.rows, layout
        with torch.no_grad():
            self._constants = compute_constants(self.weights, tree)
        found = self._bytes(1, keeps=False)
        self.class_list_bytes = found.constants + found.packed  # of layer 0; copies of weights

    def _bytes(self, batch: int, *, keeps: bool) -> PassBytes:
        return shape_pass(self._constants, ShapeOps(self.layout), batch, keeps=keeps, largest_panel_only=True)

    def activation_bytes(self, batch: int, *, keeps: bool) -> int:
        # Beside the tower's: the features of all classes, and with backward the gradients of them and of the leaves'.
        counts = self.counts
        features = 2 * counts.classes + counts.leaves if keeps else counts.classes
        around = batch * features * self.weights.projection.weight.shape[1] * self.itemsize
        return self._bytes(batch, keeps=keeps).activations + around

    def saved_bytes(self, batch: int) -> int:
        return self._bytes(batch, keeps=True).saved

    def _of_tower(self, batch: int, *, keeps: bool) -> Counter[Operation]:
        ops = CountingOps(self.layout)
        shape_pass(self._constants, ops, batch, keeps=keeps)
        leaves, (d, e) = batch * self.counts.leaves, self.weights.projection.weight.shape
        projection = [Product(leaves, d, e), Product(leaves, e, d, backward=True)]
        return Counter([*ops.operations, *projection[: 2 if keeps else 1]])


class DenseCost(Cost):
    """The reference: K prompts of L tokens an image, one image after another, in eager PyTorch.

    Every image's graph is kept until the loss of all is there. An inference pass assembles the prompts of all images
    first. Allocators add to the memory: on a CPU up to half as much.
    """

    eager = True

    def __init__(self, weights: TextWeights, tree: ClassTree) -> None:
        super().__init__(weights, tree)
        length, self.width = weights.positional_embedding.shape
        self.rows = self.counts.classes * length
        # The reference's buffers `token_prefix` and `token_suffix`: all prompts, without their context.
        others = self.counts.classes * (length - self.counts.context)
        self.class_list_bytes = others * self.width * self.itemsize

    @cached_property
    def _image(self) -> dict[bool, EagerPass]:
        """A pass of one image; True: with its backward."""
        return {keeps: dense_pass(self.weights, self.counts, keeps=keeps) for keeps in (False, True)}

    def activation_bytes(self, batch: int, *, keeps: bool) -> int:
        prompts = self.rows * self.width * self.itemsize
        return self._image[keeps].bytes + (batch - 1) * (self.saved_bytes(1) if keeps else prompts)

    def saved_bytes(self, batch: int) -> int:
        return batch * self._image[True].saved_bytes

    def _of_tower(self, batch: int, *, keeps: bool) -> Counter[Operation]:
        return Counter({op: batch * n for op, n in self._image[keeps].operations.items()})


# -- the engine --------------------------------------------------------------------------------------------------


class CountingOps(ShapeOps):
    """Operations that note what they are given."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.fuses = not isinstance(layout, GpuLayout)
        self.operations: list[Operation] = []

    def note(self, kind: str, elements: float, flops: float = 0.0, launches: int = 1) -> None:
        self.operations.append(RowKernel(kind, elements, flops, launches))

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
    """Notes its products, and the LayerNorm behind one; the activation behind one where it does not go with the product."""

    def __init__(self, packed_bytes: int, columns: int, inner: int, ops: CountingOps) -> None:
        super().__init__(packed_bytes)
        self.columns, self.inner, self.ops = columns, inner, ops

    def _product(self, x: Tensor, *, backward: bool = False, fused: bool = False) -> None:
        inner, columns = (self.columns, self.inner) if backward else (self.inner, self.columns)
        self.ops.operations.append(Product(len(x), inner, columns, backward, fused and self.ops.fuses))
        if fused and not self.ops.fuses:  # u, result; du, u, du
            kind, passes = ("activation_bwd", 3.0) if backward else ("activation_fwd", 2.0)
            self.ops.note(kind, passes * len(x) * columns)

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
    """Notes attention over a tree, of all rows or, in the last layer, of the leaves alone."""

    def __init__(self, tree: ClassTree, leaves_alone: bool, ops: CountingOps) -> None:
        counts, self.ops = RowCounts.of(tree), ops
        self.kind = "leaf_attention" if leaves_alone else "tree_attention"
        queries, pairs = (counts.leaves, counts.leaf_pairs) if leaves_alone else (counts.rows, counts.pairs)
        # Keys and values are read, queries as well, results written; each pair is two products of a head's size.
        self.rows, self.flops = 2.0 * counts.rows + 2.0 * queries, 4.0 * pairs

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        return 0  # memory is counted apart

    def forward(self, inputs: AttentionInputs, o: Tensor) -> None:
        size = len(o) * o.shape[-1]
        self.ops.note(f"{self.kind}_fwd", size * self.rows, size * self.flops)

    def backward(self, grad_o: Tensor, *others: Any, **options: Any) -> None:
        # The scores again, two products for each of forward's, and partial results summed in a kernel of its own.
        size = len(grad_o) * grad_o.shape[-1]
        self.ops.note(f"{self.kind}_bwd", 7 / 4 * size * self.rows, 2.5 * size * self.flops, launches=2)


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


# -- the reference -----------------------------------------------------------------------------------------------


class EagerPass(PeakBytes):
    """Notes the operations of torch while it is on, and what they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.backward = False  # whether what runs now is a backward
        self.saved_bytes = 0  # what forward left behind

    def end_forward(self) -> None:
        self.saved_bytes, self.backward = self._now, True

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = super().__torch_dispatch__(operation, types, args, kwargs)
        inputs, results = ([one for one in tree_leaves(x) if isinstance(one, Tensor)] for x in (args, made))
        views = {one.untyped_storage()._cdata for one in inputs}
        # What has no rows is passed over: CLIP keeps its LayerNorms in float32, which here are cast.
        if results and results[0].ndim > 1 and results[0].untyped_storage()._cdata not in views:
            self.operations[self._operation(operation, args, [*inputs, *results])] += 1
        return made

    def _operation(self, operation: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> Operation:
        if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            x, weight = args[-2:]
            return Product(len(x), weight.shape[0], weight.shape[1], self.backward)
        way, elements = "bwd" if self.backward else "fwd", float(sum(one.numel() for one in tensors))
        if "attention" not in str(operation):
            return RowKernel(f"eager_{way}", elements)
        # (n, H, L, D) queries, or gradients of the results. Backward computes the scores again: 5 products for 2.
        rows, products = tensors[0], 5 if self.backward else 2
        return RowKernel(f"attention_{way}", elements, 2.0 * products * rows.numel() * rows.shape[2])


def dense_pass(weights: TextWeights, counts: RowCounts, *, keeps: bool) -> EagerPass:
    """Runs one image's K prompts through a text tower on meta, as the reference does; `keeps`: and back."""
    w, classes = weights, counts.classes
    positions = w.positional_embedding.to(w.dtype)
    length, d = positions.shape
    context = positions.new_empty(1, counts.context, d).requires_grad_(keeps)
    prefix, suffix = context.new_empty(classes, d), context.new_empty(classes, length - 1 - counts.context, d)
    row, eot = torch.empty(2, classes, dtype=torch.int64, device="meta")
    # As good as any attention, and it says its name.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with EagerPass() as counted, torch.set_grad_enabled(keeps):
        x = assemble_dense_ref(context, prefix, suffix)[0] + positions
        for block in w.blocks:
            q, k, v = (part.transpose(1, 2).contiguous() for part in qkv_rows(x, block, w.heads))
            o = attention(q, k, v, is_causal=True)[0]
            x = finish_block(x, o.transpose(1, 2), block, w.activation)
            del q, k, v, o
        x = layer_norm_ref(x, w.ln_final)[row, eot]
        features = linear_ref(x, Affine(w.projection.weight.T, w.projection.bias))
        counted.end_forward()
        if keeps:
            features.backward(torch.empty_like(features))
    return counted
