"""The text transformer over tree rows on a CPU: C++ kernels from end to end, backward by hand.

The weights are frozen, so backward is the chain of input gradients alone. Saved for it, per row and layer: the
block's input (d), query, key and value (3d), the middle of the block (d), the MLP's pre-activation (4d) and the
LayerNorm statistics. Attention weights, LayerNorm outputs and activations are recomputed. Buffers are kept from
step to step: after the first step nothing of activation size is allocated.

Attention needs all rows of a layer. Everything between two attentions goes panel by panel of rows, so that what one
step of it writes is still in the cache when the next one reads it.

Notation: B images, M context tokens, N nodes, R = M + N rows of an image, Q distinct EOT nodes, d width.
Rows lie image-major in (B * R, .) buffers, an image's context rows first, so a linear layer is one large GEMM.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine, TextBlock, TextWeights
from cocoop_fast.engine.constants import TowerConstants
from cocoop_fast.engine.linear import FrozenLinear, LibraryLinear, frozen_linear
from cocoop_fast.engine.memory import Buffers, Statistics
from cocoop_fast.errors import UserError
from cocoop_fast.ops import cpu

# Rows that go together from one attention to the next. Fewer, and each weight is read too often; more, and the widest
# intermediate (4d floats a row) leaves the cache. docs/performance.md has the measurement.
PANEL_ROWS = 512

# Floats between the rows of what a linear layer reads, beyond their width: rows a large power of two apart would all
# fall into the same few sets of the first-level cache.
ROW_PADDING = 16


class CpuTower:
    """(B, M, d) contexts to the features of the Q distinct prompts, in float32.

    Args:
        constants: what the model and the class list fix.
        workspace: of another tower over the same weights, to share its memory. Default: a new one.
    """

    def __init__(self, constants: TowerConstants, workspace: Workspace | None = None) -> None:
        self.constants = constants
        tree = constants.tree
        self.all_rows = cpu.TreeAttention(tree)
        self.eot_rows = cpu.TreeAttention(tree, queries=tree.leaves)
        self.leaf_rows = tree.n_ctx + tree.leaves  # among the R rows of an image
        self.workspace = workspace or Workspace(constants.weights)
        self.linears, self.scratch = self.workspace.linears, self.workspace.scratch

    def encode(self, ctx: Tensor) -> Tensor:
        """(B, M, d) contexts to (B, Q, E) text features of the tree's leaves."""
        ctx = ctx.to(torch.float32)
        if torch.is_grad_enabled() and ctx.requires_grad:
            features: Tensor = _Encode.apply(ctx, self)
            return features
        with self.workspace.lock, torch.no_grad(), _float32():
            return _forward(self, ctx, Activations(self, len(ctx), self.scratch))

    def for_part(self, constants: TowerConstants) -> CpuTower:
        """A tower of the same weights for another tree, which uses the same memory."""
        return CpuTower(constants, self.workspace)

    def release(self) -> None:
        """Give back the memory of passes that are over; the packed weights stay."""
        with self.workspace.lock:
            self.workspace.free.clear()
            self.scratch.release()


class Workspace:
    """What towers over the same weights share: the linear layers, and the memory of their passes."""

    def __init__(self, weights: TextWeights) -> None:
        last = len(weights.blocks) - 1
        self.linears = [_block_linears(block, layer, last) for layer, block in enumerate(weights.blocks)]
        self.scratch = CpuBuffers()
        self.free: list[
            list[CpuBuffers]
        ] = []  # by layer: memory of saved activations that no graph needs any more
        self.lock = threading.Lock()  # the scratch buffers serve one pass at a time

    def borrow(self) -> Lease:
        """Memory for the activations of a pass, to be kept until its backward is done."""
        return Lease(
            self, self.free.pop() if self.free else [CpuBuffers() for _ in range(len(self.linears) + 1)]
        )


@dataclass(frozen=True)
class BlockLinears:
    """The linear layers of a block."""

    qkv: FrozenLinear  # in the last layer of key and value alone
    leaf_q: FrozenLinear | None  # there, and only if it is not the first as well: of the EOT rows' queries
    out_proj: FrozenLinear
    fc: FrozenLinear
    proj: FrozenLinear


def _block_linears(block: TextBlock, layer: int, last: int) -> BlockLinears:
    d = block.out_proj.weight.shape[0]
    skipped = d if layer == last else 0
    qkv = Affine(block.in_proj.weight[skipped:], block.in_proj.bias[skipped:])
    leaf_q = Affine(block.in_proj.weight[:d], block.in_proj.bias[:d])
    # Layer 0 projects the few context rows alone, and the last layer is for the EOT rows: not worth a packed copy.
    of_block = LibraryLinear if layer == last else frozen_linear
    return BlockLinears(
        qkv=of_block(qkv) if layer > 0 else LibraryLinear(qkv),
        leaf_q=of_block(leaf_q) if 0 < layer == last else None,
        out_proj=of_block(block.out_proj),
        fc=of_block(block.fc),
        proj=of_block(block.proj),
    )


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(node: Any, ctx: Tensor, tower: CpuTower) -> Tensor:
        lease = tower.workspace.borrow()
        activations = Activations(tower, len(ctx), lease.memory)
        with tower.workspace.lock, _float32():
            features = _forward(tower, ctx, activations)
        # Autograd drops a saved tensor as soon as the graph is done with: its lease then gives the memory back.
        owner = torch.empty(0)
        owner.lease = lease  # type: ignore[attr-defined]
        node.save_for_backward(owner)
        node.tower, node.activations = tower, activations
        return features

    @staticmethod
    def backward(node: Any, grad_features: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise UserError(
                "The CPU engine has no second derivative (create_graph=True); "
                "build the model with backend='torch' for it."
            )
        _ = node.saved_tensors  # torch refuses a second backward over a graph that was not retained
        with node.tower.workspace.lock, _float32():
            return _backward(node.tower, grad_features, node.activations), None


def _float32() -> torch.autocast:
    """The buffers are float32: autocast, where it is on, ends at the engine's door."""
    return torch.autocast("cpu", enabled=False)


class Lease:
    """Memory of a workspace, given back when the last reference to the lease goes."""

    def __init__(self, workspace: Workspace, memory: list[CpuBuffers]) -> None:
        self._workspace, self.memory = workspace, memory

    def __del__(self) -> None:
        self._workspace.free.append(self.memory)


class CpuBuffers(Buffers):
    """Float32 buffers on the CPU."""

    def __init__(self) -> None:
        super().__init__(torch.float32, torch.device("cpu"))

    def get_rows(self, name: str, rows: int, width: int) -> Tensor:
        """A (rows, width) view whose rows lie as a linear layer reads them fastest."""
        return self.get(name, rows, width + ROW_PADDING)[:, :width]


class LayerActivations:
    """What one layer leaves for its backward."""

    x: Tensor  # (rows, d) what LayerNorm 1 reads: all B * R rows; in layer 0 the B * M context rows
    qkv: Tensor  # (rows, 3d) their query, key and value; in the last layer (rows, 2d), key and value
    q: cpu.ImageRows  # what attention reads: views of qkv, with the constant node rows in layer 0
    k: cpu.ImageRows
    v: cpu.ImageRows
    x_mid: Tensor  # (queries, d) after attention: all B * R rows; in the last layer the B * Q EOT rows
    u: Tensor  # (queries, 4d) MLP pre-activations; kept for backward alone
    stats_1: Statistics  # mean and reciprocal standard deviation of each row of x
    stats_q: Statistics  # in the last layer, of the EOT rows of x alone
    stats_2: Statistics  # of x_mid


class Activations:
    """The buffers of one forward pass over `batch` images.

    Args:
        tower: gives the sizes.
        batch: B.
        memory: for a pass without backward buffers that all layers use in turn; else one for each layer, and one
            for what follows them.
    """

    def __init__(self, tower: CpuTower, batch: int, memory: CpuBuffers | list[CpuBuffers]) -> None:
        w = tower.constants.weights
        self.batch = batch
        self.keeps = isinstance(memory, list)
        leaves = batch * len(tower.leaf_rows)
        *of_layers, of_end = memory if isinstance(memory, list) else [memory] * (len(w.blocks) + 1)
        self.x_out = of_end.get("x_leaf", leaves, w.width)
        self.stats_out = _statistics(leaves)
        self.layers = [
            self._layer(tower, layer, block, own)
            for layer, (block, own) in enumerate(zip(w.blocks, of_layers, strict=True))
        ]

    def _layer(self, tower: CpuTower, layer: int, block: TextBlock, own: CpuBuffers) -> LayerActivations:
        c, batch, d = tower.constants, self.batch, tower.constants.weights.width
        first, last = layer == 0, layer == len(c.weights.blocks) - 1
        rows = batch * (c.tree.n_ctx if first else c.tree.rows)
        queries = batch * (len(tower.leaf_rows) if last else c.tree.rows)
        a = LayerActivations()
        a.x = own.get("x_ctx" if first else "x", rows, d)
        # Without backward, the middle of a block takes the place of its input.
        a.x_mid = own.get("x_leaf" if last else "x_mid" if self.keeps else "x", queries, d)
        if self.keeps:
            a.u = own.get("u", queries, block.fc.weight.shape[0])
        a.stats_1, a.stats_q, a.stats_2 = (_statistics(n) for n in (rows, queries if last else 0, queries))
        a.qkv = own.get("qkv", rows, (2 if last else 3) * d)
        *queries_of_rows, k, v = a.qkv.view(batch, -1, a.qkv.shape[1]).split(d, dim=-1)
        if first:
            node_q, node_k, node_v = (part.reshape(-1, d) for part in c.node_qkv)
            a.k, a.v = (k, node_k), (v, node_v)
            leaf_q = node_q[c.leaves].expand(batch, -1, -1) if last else None
            a.q = leaf_q if leaf_q is not None else (queries_of_rows[0], node_q)
        else:
            a.k, a.v = k, v
            a.q = own.get("q", queries, d).view(batch, -1, d) if last else queries_of_rows[0]
        return a


def _statistics(rows: int) -> Statistics:
    return torch.empty(rows), torch.empty(rows)


def _panels(rows: int) -> list[slice]:
    """Slices of about PANEL_ROWS rows, all of nearly the same length."""
    count = max(1, round(rows / PANEL_ROWS))
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _forward(tower: CpuTower, ctx: Tensor, acts: Activations) -> Tensor:
    c, w, s, batch = tower.constants, tower.constants.weights, tower.scratch, acts.batch
    d, last = w.width, len(w.blocks) - 1
    torch.add(ctx, c.positions, out=acts.layers[0].x.view(batch, -1, d))
    for panel in _panels(len(acts.layers[0].x)):
        _project_qkv(tower, acts, 0, panel)
    for layer, (block, linears, a) in enumerate(zip(w.blocks, tower.linears, acts.layers, strict=True)):
        residual = _rows_that_ask(tower, a, layer, batch)
        if linears.leaf_q is not None:
            _project_leaf_queries(s, a, block.ln_1, linears.leaf_q)
        o = s.get_rows("o", len(a.x_mid), d)
        attention = tower.eot_rows if layer == last else tower.all_rows
        attention.forward(a.q, a.k, a.v, *c.sos_kv[layer], w.heads, o.view(batch, -1, d))
        x = acts.x_out if layer == last else acts.layers[layer + 1].x
        for panel in _panels(len(x)):
            # x_mid = x + W_o attention(q, k, v) + b_o
            linears.out_proj.forward(o[panel], a.x_mid[panel], residual=residual[panel])
            normed = _layer_norm(s, a.x_mid, block.ln_2, a.stats_2, panel)
            # x = x_mid + W_p act(W_f LN_2(x_mid) + b_f) + b_p
            g = s.get_rows("g", len(normed), block.fc.weight.shape[0])
            linears.fc.forward_activation(normed, w.activation, a.u[panel] if acts.keeps else None, g)
            linears.proj.forward(g, x[panel], residual=a.x_mid[panel])
            if layer < last:
                _project_qkv(tower, acts, layer + 1, panel)
    whole = slice(0, len(acts.x_out))
    normed = _layer_norm(s, acts.x_out, w.ln_final, acts.stats_out, whole)
    features = torch.addmm(w.projection.bias, normed, w.projection.weight)
    return features.view(batch, -1, features.shape[1])


def _layer_norm(s: CpuBuffers, x: Tensor, norm: Affine, stats: Statistics, panel: slice) -> Tensor:
    """LN(x) of the panel."""
    rows = x[panel]
    normed = s.get_rows("h", *rows.shape)
    mean, rstd = (one[panel] for one in stats)
    cpu.layer_norm_fwd(rows, None, norm.weight, norm.bias, norm.eps, normed, mean, rstd)
    return normed


def _project_qkv(tower: CpuTower, acts: Activations, layer: int, panel: slice) -> None:
    """q, k, v = W_qkv LN_1(x) + b_qkv; in the last layer k and v alone."""
    a = acts.layers[layer]
    normed = _layer_norm(tower.scratch, a.x, tower.constants.weights.blocks[layer].ln_1, a.stats_1, panel)
    tower.linears[layer].qkv.forward(normed, a.qkv[panel])


def _project_leaf_queries(s: CpuBuffers, a: LayerActivations, ln_1: Affine, leaf_q: FrozenLinear) -> None:
    """q = W_q LN_1(x) + b_q of the EOT rows, which x_mid holds until attention is added to it."""
    assert isinstance(a.q, Tensor)
    normed = _layer_norm(s, a.x_mid, ln_1, a.stats_q, slice(0, len(a.x_mid)))
    leaf_q.forward(normed, a.q.view(len(normed), -1))


def _rows_that_ask(tower: CpuTower, a: LayerActivations, layer: int, batch: int) -> Tensor:
    """(queries, d): the rows of x that the attention output is added to, if need be gathered into x_mid."""
    c, m = tower.constants, tower.constants.tree.n_ctx
    first, last = layer == 0, layer == len(c.weights.blocks) - 1
    mid = a.x_mid.view(batch, -1, a.x_mid.shape[1])
    if first and last:
        mid.copy_(c.node_rows[c.leaves])
    elif first:
        mid[:, :m].copy_(a.x.view(batch, m, -1))
        mid[:, m:].copy_(c.node_rows)
    elif last:
        cpu.gather_rows(a.x.view(batch, -1, a.x.shape[1]), tower.leaf_rows, mid)
    else:
        return a.x
    return a.x_mid


def _backward(tower: CpuTower, grad_features: Tensor, acts: Activations) -> Tensor:
    c, w, s, batch = tower.constants, tower.constants.weights, tower.scratch, acts.batch
    d, m, last = w.width, c.tree.n_ctx, len(w.blocks) - 1
    grad_normed = s.get("h", len(acts.x_out), d)
    torch.mm(grad_features.flatten(0, 1), w.projection.weight.T, out=grad_normed)
    grad_x = s.get_rows("grad_x_leaf", len(acts.x_out), d)
    cpu.layer_norm_bwd(grad_normed, acts.x_out, w.ln_final.weight, *acts.stats_out, grad_x, accumulate=False)
    for layer in range(last, -1, -1):
        a, linears = acts.layers[layer], tower.linears[layer]
        grad_o = s.get("o", *a.x_mid.shape)
        for panel in _panels(len(grad_x)):
            _mlp_backward(tower, a, layer, grad_x, grad_o, panel)
        grad_qkv = s.get_rows("grad_qkv", *a.qkv.shape)
        grad_q = _attention_backward(tower, a, layer, grad_o, grad_qkv)
        if layer == 0:
            grad_ctx = torch.empty(batch * m, d)
            for panel in _panels(len(grad_ctx)):
                _qkv_backward(tower, a, layer, grad_qkv, grad_ctx, panel, accumulate=False)
            grad_ctx = grad_ctx.view(batch, m, d)
            return grad_ctx if layer == last else grad_ctx.add_(grad_x.view(batch, -1, d)[:, :m])
        if layer < last:
            for panel in _panels(len(grad_x)):
                _qkv_backward(tower, a, layer, grad_qkv, grad_x, panel, accumulate=True)
            continue
        grad_leaf, grad_x = grad_x, s.get_rows("grad_x", *a.x.shape)
        for panel in _panels(len(grad_x)):
            _qkv_backward(tower, a, layer, grad_qkv, grad_x, panel, accumulate=False)
        assert linears.leaf_q is not None
        _leaf_queries_backward(tower, a, linears.leaf_q, grad_q, grad_leaf)
        rows = grad_x.view(batch, -1, d)
        cpu.scatter_rows(grad_leaf.view(batch, -1, d), tower.leaf_rows, rows, accumulate=True)
    raise AssertionError("a text tower has at least one layer")


def _mlp_backward(
    tower: CpuTower, a: LayerActivations, layer: int, grad_x: Tensor, grad_o: Tensor, panel: slice
) -> None:
    """grad x += LN_2'(W_f^T (act'(u) * W_p^T grad x)): now that of x_mid. Then grad o = W_o^T grad x_mid."""
    s, weights, linears = tower.scratch, tower.constants.weights, tower.linears[layer]
    u, grad_rows = a.u[panel], grad_x[panel]
    grad_u = s.get_rows("g", *u.shape)
    linears.proj.backward_activation(grad_rows, u, weights.activation, grad_u)
    grad_normed = s.get_rows("h", *grad_rows.shape)
    linears.fc.backward(grad_u, grad_normed)
    mean, rstd = (one[panel] for one in a.stats_2)
    ln_2 = weights.blocks[layer].ln_2
    cpu.layer_norm_bwd(grad_normed, a.x_mid[panel], ln_2.weight, mean, rstd, grad_rows)
    linears.out_proj.backward(grad_rows, grad_o[panel])


def _qkv_backward(
    tower: CpuTower,
    a: LayerActivations,
    layer: int,
    grad_qkv: Tensor,
    grad_x: Tensor,
    panel: slice,
    *,
    accumulate: bool,
) -> None:
    """grad x (+)= LN_1'(W_qkv^T grad qkv); in the last layer of k and v alone."""
    grad_normed = tower.scratch.get_rows("h", *a.x[panel].shape)
    tower.linears[layer].qkv.backward(grad_qkv[panel], grad_normed)
    mean, rstd = (one[panel] for one in a.stats_1)
    ln_1 = tower.constants.weights.blocks[layer].ln_1
    cpu.layer_norm_bwd(grad_normed, a.x[panel], ln_1.weight, mean, rstd, grad_x[panel], accumulate)


def _leaf_queries_backward(
    tower: CpuTower, a: LayerActivations, leaf_q: FrozenLinear, grad_q: Tensor | None, grad_leaf: Tensor
) -> None:
    """grad x += LN_1'(W_q^T grad q) of the EOT rows, the only ones with queries in the last layer."""
    assert grad_q is not None
    s, d = tower.scratch, grad_leaf.shape[1]
    grad_normed, x = s.get_rows("h", *grad_leaf.shape), s.get("o", *grad_leaf.shape)
    leaf_q.backward(grad_q, grad_normed)
    batch = len(a.x) // tower.constants.tree.rows
    cpu.gather_rows(a.x.view(batch, -1, d), tower.leaf_rows, x.view(batch, -1, d))
    ln_1 = tower.constants.weights.blocks[-1].ln_1
    cpu.layer_norm_bwd(grad_normed, x, ln_1.weight, *a.stats_q, grad_leaf)


def _attention_backward(
    tower: CpuTower, a: LayerActivations, layer: int, grad_o: Tensor, grad_qkv: Tensor
) -> Tensor | None:
    """Writes grad qkv (rows, 3d or 2d). The last layer's queries are not among its rows: returns (B * Q, d)."""
    c, s, d = tower.constants, tower.scratch, grad_o.shape[1]
    heads, first, last = c.weights.heads, layer == 0, layer == len(c.weights.blocks) - 1
    batch = len(a.x) // (c.tree.n_ctx if first else c.tree.rows)
    *grad_q_of_rows, grad_k, grad_v = grad_qkv.view(batch, -1, grad_qkv.shape[1]).split(d, dim=-1)
    grad_q = None
    if not last:
        (grad_q,) = grad_q_of_rows
    elif not first:
        grad_q = s.get("grad_q", batch, len(grad_o) // batch, d)
    attention = tower.eot_rows if last else tower.all_rows
    workspace = s.get("attention", attention.workspace_floats(batch, heads, d // heads))
    inputs = (grad_o.view(batch, -1, d), a.q, a.k, a.v, *c.sos_kv[layer])
    attention.backward(*inputs, heads, grad_q, grad_k, grad_v, workspace, context_only=first)
    return grad_q.view(-1, d) if last and grad_q is not None else None
