"""The text transformer over tree rows on a GPU: fused kernels between the vendor's GEMMs, backward by hand.

What is saved and why backward is so short is said in :mod:`cocoop_fast.engine.cpu_tower`; here the rows and the weights may be
float16, bfloat16 or float32 (statistics always float32), and what costs is the number of launches: 8 a layer forward and
9 backward, and 5 each that come once. A GEMM that adds a residual would copy it into its result first, so the LayerNorm
behind it adds residual and bias. Nothing waits for the device or depends on its results, so that a whole step can be
recorded as a CUDA graph.

In the last layer the GEMMs of query, key and value take all rows: queries of the EOT rows alone would save half a
percent of the multiplications and cost three launches. All that follows is for the EOT rows alone.

Notation: B images, M context tokens, N nodes, R = M + N rows of an image, Q distinct EOT nodes, d width.
Rows lie image-major in (B * R, .) buffers, an image's context rows first, so a linear layer is one large GEMM.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine, TextWeights
from cocoop_fast.engine.constants import TowerConstants
from cocoop_fast.engine.memory import Buffers, Lease, Pool, Statistics
from cocoop_fast.errors import UserError
from cocoop_fast.ops.table import kernel_table


class GpuTower:
    """(B, M, d) contexts to the features of the Q distinct prompts, in the dtype of the weights.

    Args:
        constants: what the model and the class list fix.
        kernels: the launchers, an interface as :mod:`cocoop_fast.ops.triton` has it.
        workspace: of another tower over the same weights, to share its memory. Default: a new one.
    """

    def __init__(self, constants: TowerConstants, kernels: Any, workspace: Workspace | None = None) -> None:
        self.constants = constants
        self.kernels = kernels
        tree, device = constants.tree, constants.weights.device
        self.all_rows = kernels.TreeAttention(tree, device=device)
        self.eot_rows = kernels.TreeAttention(tree, queries=tree.leaves, device=device)
        self.leaf_rows = tree.n_ctx + constants.leaves  # among the R rows of an image
        self.workspace = workspace or Workspace(constants.weights)

    def encode(self, ctx: Tensor) -> Tensor:
        """(B, M, d) contexts to (B, Q, E) text features of the tree's leaves."""
        if torch.is_grad_enabled() and ctx.requires_grad:
            features: Tensor = _Encode.apply(ctx, self)
            return features
        lease = self.workspace.inference.borrow()
        with torch.no_grad(), _own_types(ctx):
            return _forward(self, ctx, lease.memory.activations(self, len(ctx)))

    def for_part(self, constants: TowerConstants) -> GpuTower:
        """A tower of the same weights for another tree, which uses the same memory."""
        return GpuTower(constants, self.kernels, self.workspace)

    def release(self) -> None:
        """Give back the memory of passes that are over."""
        self.workspace.training.free.clear()
        self.workspace.inference.free.clear()


def tower_on(backend: str, constants: TowerConstants) -> GpuTower:
    """The tower with the kernels of a backend: "triton" or "cuda"."""
    return GpuTower(constants, kernel_table(backend))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(node: Any, ctx: Tensor, tower: GpuTower) -> Tensor:
        lease = tower.workspace.training.borrow()
        with _own_types(ctx):
            features = _forward(tower, ctx, lease.memory.activations(tower, len(ctx)))
        node.tower, node.batch, node.ctx_dtype = tower, len(ctx), ctx.dtype
        node.save_for_backward(lease.owner())
        return features

    @staticmethod
    def backward(node: Any, grad_features: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise UserError(
                "The GPU engine has no second derivative (create_graph=True); "
                "build the model with backend='torch' for it."
            )
        (owner,) = node.saved_tensors
        lease: Lease[PassMemory] = owner.lease
        with _own_types(grad_features):
            grad_rows = _backward(node.tower, grad_features, lease.memory.activations(node.tower, node.batch))
            # The buffer is the next step's too: the gradient gets memory of its own.
            grad_ctx = torch.empty(grad_rows.shape, dtype=node.ctx_dtype, device=grad_rows.device)
            return grad_ctx.copy_(grad_rows), None


def _own_types(like: Tensor) -> torch.autocast:
    """The buffers have the weights' dtype: autocast, where it is on, ends at the engine's door."""
    return torch.autocast(like.device.type, enabled=False)


class Workspace:
    """The memory that towers over the same weights share, for passes with and without a backward."""

    def __init__(self, weights: TextWeights) -> None:
        self.training = Pool(partial(PassMemory, weights, keeps=True))
        self.inference = Pool(partial(PassMemory, weights, keeps=False))


class PassMemory:
    """The memory of one pass.

    Args:
        weights: what for.
        keeps: every layer keeps its activations for a backward. Otherwise all use the same buffers in turn.
    """

    def __init__(self, weights: TextWeights, *, keeps: bool) -> None:
        buffers = partial(Buffers, weights.dtype, weights.device)
        self.scratch = buffers()
        self.floats = Buffers(torch.float32, weights.device)
        self.layers = [buffers() if keeps else self.scratch for _ in weights.blocks]
        self.keeps = keeps
        self._activations: Activations | None = None

    def activations(self, tower: GpuTower, batch: int) -> Activations:
        """The memory laid out for a tree and B images. Made anew only when either is another than last time."""
        last = self._activations
        if last is None or last.constants is not tower.constants or last.batch != batch:
            self._activations = last = Activations(tower, batch, self)
        return last

    def statistics_of(self, name: str, rows: int) -> Statistics:
        """Mean and reciprocal standard deviation of so many rows."""
        mean, rstd = self.floats.get(f"statistics of {name}", 2, rows).unbind()
        return mean, rstd


class LayerActivations:
    """What one layer leaves for its backward. Its rows: all B * R; in layer 0 the B * M context rows."""

    x: Tensor  # what LayerNorm 1 reads: (rows, d); in layer 0 (B, M, d), a part of `residual`
    residual: Tensor  # (B * R, d) what is added to the attention's output
    qkv: Tensor  # (rows, 3d) query, key and value
    q: Any  # what attention reads: views of qkv, with the constant node rows in layer 0
    k: Any
    v: Any
    x_mid: Tensor  # (queries, d) after attention: all B * R rows; in the last layer the B * Q EOT rows
    u: Tensor  # (queries, 4d) MLP pre-activations, without their bias
    stats_1: Statistics  # mean and reciprocal standard deviation of each row of x
    stats_2: Statistics  # of x_mid


class Activations:
    """What a pass over `batch` images leaves for its backward, with what both need besides.

    Args:
        tower: gives the sizes.
        batch: B.
        memory: where it all is.
    """

    def __init__(self, tower: GpuTower, batch: int, memory: PassMemory) -> None:
        c = self.constants = tower.constants
        w, m = c.weights, c.tree.n_ctx
        self.batch = batch
        self.scratch = memory.scratch
        self.layers = [self._layer(layer, memory) for layer in range(len(w.blocks))]
        self.layers[0].residual.view(batch, -1, w.width)[:, m:] = c.node_rows  # and they stay there
        self.x_out = self.scratch.get("x_out", batch * len(c.leaves), w.width)
        self.stats_out = memory.statistics_of("x_out", len(self.x_out))
        if memory.keeps:
            sizes = batch, w.heads, w.width // w.heads
            floats = max(one.workspace_floats(*sizes) for one in (tower.all_rows, tower.eot_rows))
            self.workspace = memory.floats.get("partials", floats)
            # The gradients of the last layer's queries stay zero but for the EOT rows.
            self.grad_qkv_last = self.scratch.get("grad_qkv_last", *self.layers[-1].qkv.shape).zero_()

    def _layer(self, layer: int, memory: PassMemory) -> LayerActivations:
        c, batch, own = self.constants, self.batch, memory.layers[layer]
        d, m = c.weights.width, c.tree.n_ctx
        first, last = layer == 0, layer == len(c.weights.blocks) - 1
        rows = batch * (m if first else c.tree.rows)
        queries = batch * (len(c.leaves) if last else c.tree.rows)
        a = LayerActivations()
        a.x_mid = own.get("x_mid", queries, d)
        # Without backward, the activation takes the place of what it is of.
        a.u = own.get("u" if memory.keeps else "g", queries, c.weights.blocks[layer].fc.weight.shape[0])
        a.stats_1 = memory.statistics_of(f"x {layer}", rows)
        a.stats_2 = memory.statistics_of(f"x_mid {layer}", queries)
        a.qkv = own.get("qkv", rows, 3 * d)
        q, k, v = a.qkv.view(batch, -1, 3 * d).split(d, dim=-1)
        if first:
            node_q, node_k, node_v = (part.reshape(-1, d) for part in c.node_qkv)
            a.q, a.k, a.v = (q, node_q), (k, node_k), (v, node_v)
            a.residual = own.get("x_first", batch * c.tree.rows, d)
            a.x = a.residual.view(batch, -1, d)[:, :m]
        else:
            a.q, a.k, a.v = q, k, v
            a.x = a.residual = own.get("x", rows, d)
        if last and first:
            a.q = node_q[c.leaves].expand(batch, -1, -1)
        elif last:
            a.q = own.get("q_leaf", batch, len(c.leaves), d)
        return a


def _forward(tower: GpuTower, ctx: Tensor, acts: Activations) -> Tensor:
    c, w, kernels = tower.constants, tower.constants.weights, tower.kernels
    s, batch, d, last = acts.scratch, acts.batch, w.width, len(w.blocks) - 1
    x = acts.layers[0].x
    torch.add(ctx, c.positions, out=x)
    normed = _layer_norm(tower, acts, x, None, w.blocks[0].ln_1, acts.layers[0].stats_1)
    for layer, (block, a) in enumerate(zip(w.blocks, acts.layers, strict=True)):
        torch.addmm(block.in_proj.bias, normed, block.in_proj.weight.T, out=a.qkv)
        residual = a.residual
        if layer == last:
            residual = s.get("x_leaf", batch, len(c.leaves), d)
            kernels.gather_rows(a.residual.view(batch, -1, d), tower.leaf_rows, residual)
            if layer > 0:  # in layer 0 the nodes' queries are constants
                kernels.gather_rows(a.qkv.view(batch, -1, 3 * d)[..., :d], tower.leaf_rows, a.q)
        # x_mid = x + W_o attention(q, k, v) + b_o, but for the GEMM added by LayerNorm 2
        o = s.get("o", len(a.x_mid), d)
        attention = tower.eot_rows if layer == last else tower.all_rows
        attention.forward(a.q, a.k, a.v, *c.sos_kv[layer], w.heads, o.view(batch, -1, d))
        torch.mm(o, block.out_proj.weight.T, out=a.x_mid)
        normed = _layer_norm(tower, acts, a.x_mid, block.out_proj.bias, block.ln_2, a.stats_2, residual)
        # x = x_mid + W_p act(W_f LN_2(x_mid) + b_f) + b_p, but for the GEMM added by the next LayerNorm
        torch.mm(normed, block.fc.weight.T, out=a.u)
        g = s.get("g", *a.u.shape)
        kernels.activation_fwd(a.u, block.fc.bias, w.activation, g)
        following = acts.layers[layer + 1] if layer < last else None
        x = following.x if following else acts.x_out
        torch.mm(g, block.proj.weight.T, out=x)
        norm = w.blocks[layer + 1].ln_1 if following else w.ln_final
        stats = following.stats_1 if following else acts.stats_out
        normed = _layer_norm(tower, acts, x, block.proj.bias, norm, stats, a.x_mid)
    features = torch.addmm(w.projection.bias, normed, w.projection.weight)
    return features.view(batch, -1, features.shape[1])


def _layer_norm(
    tower: GpuTower,
    acts: Activations,
    x: Tensor,
    bias: Tensor | None,
    norm: Affine,
    stats: Statistics,
    residual: Tensor | None = None,
) -> Tensor:
    """x += bias + residual; LN(x), as (rows, d)."""
    normed = acts.scratch.get("h", x.shape[:-1].numel(), x.shape[-1])
    tower.kernels.layer_norm_fwd(x, bias, norm.weight, norm.bias, norm.eps, normed, *stats, residual)
    return normed


def _backward(tower: GpuTower, grad_features: Tensor, acts: Activations) -> Tensor:
    """(B, M, d) rows, of the pass's own memory."""
    c, w, kernels = tower.constants, tower.constants.weights, tower.kernels
    s, batch, d, m, last = acts.scratch, acts.batch, w.width, c.tree.n_ctx, len(w.blocks) - 1
    grad_normed = s.get("h", *acts.x_out.shape)
    torch.mm(grad_features.flatten(0, 1), w.projection.weight.T, out=grad_normed)
    grad_x = s.get("grad_leaf", *acts.x_out.shape)
    kernels.layer_norm_bwd(
        grad_normed, acts.x_out, w.ln_final.weight, *acts.stats_out, grad_x, accumulate=False
    )
    for layer in range(last, -1, -1):
        block, a = w.blocks[layer], acts.layers[layer]
        # grad x += LN_2'(W_f^T (act'(u) * W_p^T grad x)): now that of x_mid. Then grad o = W_o^T grad x_mid.
        grad_u = s.get("g", *a.u.shape)
        torch.mm(grad_x, block.proj.weight, out=grad_u)
        kernels.activation_bwd(a.u, block.fc.bias, w.activation, grad_u)
        grad_normed = s.get("h", *grad_x.shape)
        torch.mm(grad_u, block.fc.weight, out=grad_normed)
        kernels.layer_norm_bwd(grad_normed, a.x_mid, block.ln_2.weight, *a.stats_2, grad_x)
        grad_o = s.get("o", *grad_x.shape)
        torch.mm(grad_x, block.out_proj.weight, out=grad_o)
        grad_qkv = _attention_backward(tower, acts, layer, grad_o)
        # grad x (+)= LN_1'(W_qkv^T grad qkv)
        grad_normed = s.get("h", len(grad_qkv), d)
        torch.mm(grad_qkv, block.in_proj.weight, out=grad_normed)
        grad_rows, residual = grad_x, layer < last
        if layer == 0:
            grad_rows = (grad_x if residual else s.get("grad_x", batch * m, d)).view(batch, -1, d)[:, :m]
        elif not residual:
            grad_rows = s.get("grad_x", *a.x.shape)
        kernels.layer_norm_bwd(
            grad_normed, a.x, block.ln_1.weight, *a.stats_1, grad_rows, accumulate=residual
        )
        if layer == last and layer > 0:
            grad_leaf = grad_x.view(batch, -1, d)
            kernels.scatter_rows(grad_leaf, tower.leaf_rows, grad_rows.view(batch, -1, d), accumulate=True)
        grad_x = grad_rows
    return grad_x


def _attention_backward(tower: GpuTower, acts: Activations, layer: int, grad_o: Tensor) -> Tensor:
    """(rows, 3d) gradients of query, key and value; in layer 0 of the context rows alone."""
    c, s, d, batch = tower.constants, acts.scratch, grad_o.shape[1], acts.batch
    a, first, last = acts.layers[layer], layer == 0, layer == len(acts.layers) - 1
    grad_qkv = acts.grad_qkv_last if last else s.get("grad_qkv", *a.qkv.shape)
    grad_q, grad_k, grad_v = grad_qkv.view(batch, -1, 3 * d).split(d, dim=-1)
    dq: Tensor | None = grad_q
    if last:  # the queries are not the rows of qkv; of layer 0 they are constants as well
        dq = None if first else s.get("grad_q", batch, len(c.leaves), d)
    attention = tower.eot_rows if last else tower.all_rows
    attention.backward(
        grad_o.view(batch, -1, d), a.q, a.k, a.v, *c.sos_kv[layer], c.weights.heads,
        dq, grad_k, grad_v, acts.workspace, context_only=first,
    )  # fmt: skip
    if last and dq is not None:
        tower.kernels.scatter_rows(dq, tower.leaf_rows, grad_q)
    return grad_qkv
