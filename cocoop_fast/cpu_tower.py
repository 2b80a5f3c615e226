"""The text transformer over tree rows on a CPU: C++ kernels between the vendor's GEMMs, backward by hand.

The weights are frozen, so backward is the chain of input gradients alone. Saved for it, per row and layer: the
block's input (d), query, key and value (3d), the middle of the block (d), the MLP's pre-activation (4d) and the
LayerNorm statistics. Attention weights, LayerNorm outputs and activations are recomputed. Buffers are kept from
step to step: after the first step nothing of activation size is allocated.

Notation: B images, M context tokens, N nodes, R = M + N rows of an image, Q distinct EOT nodes, d width.
Rows lie image-major in (B * R, .) buffers, an image's context rows first, so a linear layer is one large GEMM.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.clip import Affine, TextBlock
from cocoop_fast.errors import UserError
from cocoop_fast.ops import cpu_kernels as cpu
from cocoop_fast.tower_rows import TowerConstants


class CpuTower:
    """(B, M, d) contexts to the features of the Q distinct prompts, in float32.

    Args:
        constants: what the model and the class list fix.
    """

    def __init__(self, constants: TowerConstants) -> None:
        self.constants = constants
        tree = constants.tree
        self.all_rows = cpu.TreeAttention(tree)
        self.eot_rows = cpu.TreeAttention(tree, queries=tree.leaves)
        self.leaf_rows = tree.n_ctx + tree.leaves  # among the R rows of an image
        self.scratch = Buffers()
        self.free: list[Activations] = []  # sets of saved activations that no graph needs any more
        self.lock = threading.Lock()  # the scratch buffers serve one pass at a time

    def encode(self, ctx: Tensor) -> Tensor:
        """(B, M, d) contexts to (B, Q, E) text features of the tree's leaves."""
        ctx = ctx.to(torch.float32)
        if torch.is_grad_enabled() and ctx.requires_grad:
            features: Tensor = _Encode.apply(ctx, self)
            return features
        with self.lock, torch.no_grad(), _float32():
            return _forward(self, ctx, Activations(self, len(ctx), self.scratch))

    def borrow(self, batch: int) -> Activations:
        """A set of buffers for the activations of `batch` images, to be kept until backward is done."""
        while self.free:
            activations = self.free.pop()
            if activations.batch == batch:
                return activations
        return Activations(self, batch)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(node: Any, ctx: Tensor, tower: CpuTower) -> Tensor:
        activations = tower.borrow(len(ctx))
        with tower.lock, _float32():
            features = _forward(tower, ctx, activations)
        # Autograd drops a saved tensor as soon as the graph is done with: its owner then gives the buffers back.
        owner = torch.empty(0)
        owner.lease = _Lease(tower, activations)  # type: ignore[attr-defined]
        node.save_for_backward(owner)
        return features

    @staticmethod
    def backward(node: Any, grad_features: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise UserError(
                "The CPU engine has no second derivative (create_graph=True); "
                "build the model with backend='torch' for it."
            )
        (owner,) = node.saved_tensors
        lease: _Lease = owner.lease
        with lease.tower.lock, _float32():
            return _backward(lease.tower, grad_features, lease.activations), None


def _float32() -> torch.autocast:
    """The buffers are float32: autocast, where it is on, ends at the engine's door."""
    return torch.autocast("cpu", enabled=False)


class _Lease:
    """Gives a set of activation buffers back to its tower when the last reference to it goes."""

    def __init__(self, tower: CpuTower, activations: Activations) -> None:
        self.tower, self.activations = tower, activations

    def __del__(self) -> None:
        self.tower.free.append(self.activations)


class Buffers:
    """Named float32 buffers that grow when they must, and are otherwise the same memory again and again."""

    def __init__(self) -> None:
        self._storage: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """A contiguous view of the named buffer; its content is whatever was there."""
        size = 1
        for extent in shape:
            size *= extent
        storage = self._storage.get(name)
        if storage is None or storage.numel() < size:
            storage = self._storage[name] = torch.empty(size)
        return storage[:size].view(shape)


class LayerActivations:
    """What one layer leaves for its backward."""

    x: Tensor  # (rows, d) what LayerNorm 1 reads: all B * R rows; in layer 0 the B * M context rows
    qkv: Tensor  # (rows, 3d) their query, key and value; in the last layer (rows, 2d), key and value
    q: cpu.ImageRows  # what attention reads: views of qkv, with the constant node rows in layer 0
    k: cpu.ImageRows
    v: cpu.ImageRows
    x_mid: Tensor  # (queries, d) after attention: all B * R rows; in the last layer the B * Q EOT rows
    u: Tensor  # (queries, 4d) MLP pre-activations, without their bias
    stats_1: tuple[Tensor, Tensor]  # mean and reciprocal standard deviation of each row of x
    stats_2: tuple[Tensor, Tensor]  # and of x_mid


class Activations:
    """The buffers of one forward pass over `batch` images.

    Args:
        tower: gives the sizes.
        batch: B.
        shared: for a pass without backward: buffers that all layers use in turn. Otherwise each has its own.
    """

    def __init__(self, tower: CpuTower, batch: int, shared: Buffers | None = None) -> None:
        w = tower.constants.weights
        self.batch = batch
        self.keeps = shared is None
        leaves = batch * len(tower.leaf_rows)
        self.x_out = (shared or Buffers()).get("x_leaf", leaves, w.width)
        self.stats_out = _statistics(leaves)
        self.layers = [
            self._layer(tower, layer, block, shared or Buffers()) for layer, block in enumerate(w.blocks)
        ]

    def _layer(self, tower: CpuTower, layer: int, block: TextBlock, own: Buffers) -> LayerActivations:
        c, batch, d = tower.constants, self.batch, tower.constants.weights.width
        first, last = layer == 0, layer == len(c.weights.blocks) - 1
        rows = batch * (c.tree.n_ctx if first else c.tree.rows)
        queries = batch * (len(tower.leaf_rows) if last else c.tree.rows)
        a = LayerActivations()
        a.x = own.get("x_ctx" if first else "x", rows, d)
        # Without backward, the middle of a block takes the place of its input.
        a.x_mid = own.get("x_leaf" if last else "x_mid" if self.keeps else "x", queries, d)
        a.u = own.get("u", queries, block.fc.weight.shape[0])
        a.stats_1, a.stats_2 = _statistics(rows), _statistics(queries)
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


def _statistics(rows: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows), torch.empty(rows)


def _forward(tower: CpuTower, ctx: Tensor, acts: Activations) -> Tensor:
    c, w, s, batch = tower.constants, tower.constants.weights, tower.scratch, acts.batch
    d, last = w.width, len(w.blocks) - 1
    torch.add(ctx, c.positions, out=acts.layers[0].x.view(batch, -1, d))
    pending = None  # the bias of the linear layer before, which LayerNorm adds in passing
    for layer, (block, a) in enumerate(zip(w.blocks, acts.layers, strict=True)):
        # q, k, v = W_qkv LN_1(x) + b
        normed = _layer_norm(s, a.x, pending, block.ln_1, a.stats_1)
        _project_qkv(tower, a, normed, block.in_proj, batch)
        # x_mid = x + W_o attention(q, k, v) + b_o
        o = s.get("o", len(a.x_mid), d)
        attention = tower.eot_rows if layer == last else tower.all_rows
        attention.forward(a.q, a.k, a.v, *c.sos_kv[layer], w.heads, o.view(batch, -1, d))
        residual = _rows_that_ask(tower, a, layer, batch)
        torch.addmm(residual, o, block.out_proj.weight.T, out=a.x_mid)
        # x = x_mid + W_p act(W_f LN_2(x_mid) + b_f) + b_p
        normed = _layer_norm(s, a.x_mid, block.out_proj.bias, block.ln_2, a.stats_2)
        torch.mm(normed, block.fc.weight.T, out=a.u)
        g = s.get("g", *a.u.shape) if acts.keeps else a.u
        cpu.activation_fwd(a.u, block.fc.bias, w.activation, g)
        x = acts.x_out if layer == last else acts.layers[layer + 1].x
        torch.addmm(a.x_mid, g, block.proj.weight.T, out=x)
        pending = block.proj.bias
    normed = _layer_norm(s, acts.x_out, pending, w.ln_final, acts.stats_out)
    features = torch.addmm(w.projection.bias, normed, w.projection.weight)
    return features.view(batch, -1, features.shape[1])


def _layer_norm(
    s: Buffers, x: Tensor, bias: Tensor | None, norm: Affine, stats: tuple[Tensor, Tensor]
) -> Tensor:
    """x += bias; LN(x), in one pass."""
    normed = s.get("h", *x.shape)
    cpu.layer_norm_fwd(x, bias, norm.weight, norm.bias, norm.eps, normed, *stats)
    return normed


def _project_qkv(tower: CpuTower, a: LayerActivations, normed: Tensor, in_proj: Affine, batch: int) -> None:
    d = normed.shape[1]
    skipped = in_proj.weight.shape[0] - a.qkv.shape[1]  # d in the last layer: queries of EOT rows alone
    torch.addmm(in_proj.bias[skipped:], normed, in_proj.weight[skipped:].T, out=a.qkv)
    if skipped and isinstance(a.k, Tensor):
        assert isinstance(a.q, Tensor)
        asking = tower.scratch.get("o", batch, len(tower.leaf_rows), d)
        cpu.gather_rows(normed.view(batch, -1, d), tower.leaf_rows, asking)
        torch.addmm(in_proj.bias[:d], asking.view(-1, d), in_proj.weight[:d].T, out=a.q.view(-1, d))


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
    grad_x = s.get("grad_x_leaf", len(acts.x_out), d)
    cpu.layer_norm_bwd(grad_normed, acts.x_out, w.ln_final.weight, *acts.stats_out, grad_x, accumulate=False)
    for layer in range(last, -1, -1):
        block, a = w.blocks[layer], acts.layers[layer]
        # grad x_mid = grad x + LN_2'(W_f^T (act'(u) * W_p^T grad x))
        grad_u = s.get("g", *a.u.shape)
        torch.mm(grad_x, block.proj.weight, out=grad_u)
        cpu.activation_bwd(a.u, block.fc.bias, w.activation, grad_u)
        grad_normed = s.get("h", *a.x_mid.shape)
        torch.mm(grad_u, block.fc.weight, out=grad_normed)
        cpu.layer_norm_bwd(grad_normed, a.x_mid, block.ln_2.weight, *a.stats_2, grad_x)
        # grad q, k, v = attention'(W_o^T grad x_mid); in layer 0 for the context rows alone
        grad_o = s.get("o", *a.x_mid.shape)
        torch.mm(grad_x, block.out_proj.weight, out=grad_o)
        grad_qkv = s.get("g", *a.qkv.shape)  # grad_u is not needed any more
        grad_q = _attention_backward(
            tower, a, layer, grad_o.view(batch, -1, d), grad_qkv.view(batch, -1, grad_qkv.shape[1])
        )
        # grad x = grad x_mid + LN_1'(W_qkv^T grad qkv)
        skipped = 3 * d - a.qkv.shape[1]
        grad_normed = s.get("h", *a.x.shape)
        torch.mm(grad_qkv, block.in_proj.weight[skipped:], out=grad_normed)
        if grad_q is not None:
            grad_asking = s.get("o", batch, len(tower.leaf_rows), d)  # grad_o is not needed any more
            torch.mm(grad_q, block.in_proj.weight[:d], out=grad_asking.view(-1, d))
            cpu.scatter_rows(grad_asking, tower.leaf_rows, grad_normed.view(batch, -1, d), accumulate=True)
        if layer == 0:
            grad_ctx = torch.empty(batch, m, d)
            cpu.layer_norm_bwd(
                grad_normed, a.x, block.ln_1.weight, *a.stats_1, grad_ctx.view(-1, d), accumulate=False
            )
            return grad_ctx if layer == last else grad_ctx.add_(grad_x.view(batch, -1, d)[:, :m])
        if layer == last:
            grad_leaf, grad_x = grad_x, s.get("grad_x", *a.x.shape)
            cpu.layer_norm_bwd(grad_normed, a.x, block.ln_1.weight, *a.stats_1, grad_x, accumulate=False)
            cpu.scatter_rows(
                grad_leaf.view(batch, -1, d), tower.leaf_rows, grad_x.view(batch, -1, d), accumulate=True
            )
        else:
            cpu.layer_norm_bwd(grad_normed, a.x, block.ln_1.weight, *a.stats_1, grad_x)
    raise AssertionError("a text tower has at least one layer")


def _attention_backward(
    tower: CpuTower, a: LayerActivations, layer: int, grad_o: Tensor, grad_qkv: Tensor
) -> Tensor | None:
    """Writes grad_qkv (B, rows, 3d or 2d). The last layer's queries are not among its rows: returns (B * Q, d)."""
    c, s, d = tower.constants, tower.scratch, grad_o.shape[-1]
    heads = c.weights.heads
    first, last = layer == 0, layer == len(c.weights.blocks) - 1
    *grad_q_of_rows, grad_k, grad_v = grad_qkv.split(d, dim=-1)
    grad_q = None
    if not last:
        (grad_q,) = grad_q_of_rows
    elif not first:
        grad_q = s.get("grad_q", *grad_o.shape)
    attention = tower.eot_rows if last else tower.all_rows
    workspace = s.get("attention", attention.workspace_floats(len(grad_o), heads, d // heads))
    attention.backward(
        grad_o, a.q, a.k, a.v, *c.sos_kv[layer], heads, grad_q, grad_k, grad_v, workspace, context_only=first
    )
    return grad_q.view(-1, d) if last and grad_q is not None else None
