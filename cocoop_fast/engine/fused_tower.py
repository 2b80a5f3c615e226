"""The text transformer over tree rows by a backend's operations: fused kernels between products, backward by hand.

The weights are frozen, so backward is the chain of input gradients alone. Saved for it, per row and layer: the block's
input (d), query, key and value (3d), the middle of the block (d), the MLP's pre-activation (4d) and the LayerNorm
statistics. Attention weights, LayerNorm outputs and activations are recomputed. The memory is borrowed from a pool: after
the first step nothing of activation size is allocated. Nothing here waits for a device or depends on its results, so that
a whole step can be recorded as a CUDA graph; on a CPU the layers of a pass that comes again are repeated from a recording.

Attention needs all rows of a layer. What lies between two attentions goes panel by panel of rows where the backend asks
for it, so that what one operation writes is still in the cache when the next one reads it.

Rows lie image-major in (B * R, .) buffers, an image's context rows first, so a linear layer is one large product. Layer 0
computes query, key and value of the context rows alone, since those of the nodes are constants; the last layer goes on
with the EOT rows alone after its keys and values. A deep prompt is written over the context rows before its layer reads
them; in backward it takes their gradient, and none goes on to the layer before.

Notation: B images, M context vectors, N nodes, R = M + N rows of an image, Q distinct EOT nodes, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine, TextWeights, TransformerBlock
from cocoop_fast.engine.activations import Activations, LayerActivations, lay_out
from cocoop_fast.engine.constants import TowerConstants, own_types
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.memory import Lease, PassMemory, PassSize, Pool, Statistics, undisturbed
from cocoop_fast.errors import UserError
from cocoop_fast.ops.linear import FrozenLinear
from cocoop_fast.ops.shapes import ShapeOps
from cocoop_fast.ops.table import Ops, TreeAttention
from cocoop_fast.prompts.tree import ClassTree


class FusedTower:
    """Contexts to the features of the Q distinct prompts, in the dtype of the weights.

    Args:
        constants: what the model and the class tree fix; a tree of the standard shape.
        ops: the operations.
        shared: of another tower over the same weights. Default: made for this one.
    """

    def __init__(self, constants: TowerConstants, ops: Ops, shared: SharedParts | None = None) -> None:
        self.constants, self.ops = constants, ops
        tree = constants.tree
        self.leaf_rows = tree.n_ctx + constants.leaves  # among the R rows of an image
        self.shared = shared or SharedParts(constants.weights, ops)
        self.attention, self.leaf_attention = self.shared.attentions(tree, ops)
        # The last one of each memory.
        self._layouts: WeakKeyDictionary[PassMemory, Activations] = WeakKeyDictionary()

    def encode(self, contexts: ContextRows) -> Tensor:
        """To (B, Q, E) text features of the tree's leaves."""
        if contexts.requires_grad:
            lease = self.shared.training.borrow()
            features: Tensor = _Encode.apply(self, lease, *contexts.tensors())
            lease.follow_owner()
            return features
        lease = self.shared.inference.borrow()
        with torch.no_grad(), own_types(self.constants.weights.device):
            acts = self.lay_out(contexts.batch, lease.memory)
            with acts.checked_once("forward", *contexts.types()):
                return _forward(self, contexts, acts)

    def lay_out(self, batch: int, memory: PassMemory, *, largest_panel_only: bool = False) -> Activations:
        """The memory laid out for a pass over B images."""
        w = self.constants.weights
        sizes = batch, w.heads, w.width // w.heads
        floats = max(one.workspace_floats(*sizes) for one in (self.attention, self.leaf_attention))
        acts = lay_out(self.constants, batch, memory, self.ops, floats, largest_panel_only=largest_panel_only)
        self._layouts[memory] = acts
        return acts

    def for_part(self, constants: TowerConstants) -> FusedTower:
        """A tower of the same weights for another tree, which uses the same memory."""
        return FusedTower(constants, self.ops, self.shared)

    def release(self) -> None:
        """Give back the memory of passes that are over; the packed weights stay."""
        self._layouts.clear()
        self.shared.training.release()
        self.shared.inference.release()

    @property
    def kept_bytes(self) -> int:
        """What stays allocated whatever passes come: the copies of weights."""
        return self.shared.packed_bytes

    @property
    def pooled_bytes(self) -> int:
        """The memory of passes that are over, for the next ones."""
        return self.shared.training.nbytes + self.shared.inference.nbytes

    def pass_size(self, trees: Sequence[ClassTree], batch: int, *, keeps: bool) -> PassSize:
        """What passes over B images allocate, one tree after the other; found by passes over meta tensors."""

        def found() -> PassSize:
            ops, sizes = ShapeOps(self.ops), []
            shared = SharedParts(self.constants.weights.to(torch.device("meta")), ops)
            for tree in trees:
                size = shape_pass(
                    self.constants.on_meta(tree),
                    ops,
                    batch,
                    keeps=keeps,
                    shared=shared,
                    largest_panel_only=True,
                )
                sizes.append(PassSize(size.saved + size.scratch, size.results, size.constants))
            return PassSize.most(sizes)

        return undisturbed(found)


class PassBytes(NamedTuple):
    """What a pass allocates."""

    saved: int  # kept from forward to backward
    scratch: int
    results: int  # the features, and the gradients of the contexts
    constants: int  # of the class tree
    packed: int  # copies of weights

    @property
    def activations(self) -> int:
        return self.saved + self.scratch + self.results


def shape_pass(
    constants: TowerConstants,
    ops: Ops,
    batch: int,
    *,
    keeps: bool,
    shared: SharedParts | None = None,
    largest_panel_only: bool = False,
) -> PassBytes:
    """A pass over meta tensors: nothing is computed, and what it allocates is known.

    Args:
        constants: on meta, see :meth:`TowerConstants.on_meta`.
        ops: that do nothing, or note what they are given.
        batch: B.
        keeps: whether backward follows.
        shared: of a pass before, whose memory is used again.
        largest_panel_only: enough to see how much memory a pass takes.
    """
    tower = FusedTower(constants, ops, shared)
    memory = (tower.shared.training if keeps else tower.shared.inference).borrow().memory
    shift = constants.positions.new_empty(batch, *constants.positions.shape)
    with torch.no_grad():
        acts = tower.lay_out(batch, memory, largest_panel_only=largest_panel_only)
        features = _forward(tower, ContextRows(None, shift), acts)
        if keeps:
            _backward(tower, features, acts, ContextRows(None, shift))
    saved = sum(layer.nbytes for layer in memory.layers) if keeps else 0
    return PassBytes(
        saved=saved,
        scratch=memory.nbytes - saved,
        results=features.nbytes + (shift.nbytes if keeps else 0),
        constants=constants.nbytes,
        packed=tower.shared.packed_bytes,
    )


class SharedParts:
    """What towers over the same weights share: the linear layers, the memory of their passes, and what depends on a tree
    alone: a shard of the classes, whose tower is made anew for every pass, is planned once."""

    def __init__(self, weights: TextWeights, ops: Ops) -> None:
        last = len(weights.blocks) - 1
        self.linears = [_block_linears(block, layer, last, ops) for layer, block in enumerate(weights.blocks)]
        memory = partial(PassMemory, weights.dtype, weights.device, len(weights.blocks))
        self.training = Pool(partial(memory, keeps=True))
        self.inference = Pool(partial(memory, keeps=False))
        self._device = weights.device
        self._attentions: WeakKeyDictionary[ClassTree, tuple[TreeAttention, TreeAttention]] = (
            WeakKeyDictionary()
        )

    def attentions(self, tree: ClassTree, ops: Ops) -> tuple[TreeAttention, TreeAttention]:
        """Of all rows of a tree, and of its leaves."""
        if tree not in self._attentions:
            queries = (None, tree.leaves)
            all_rows, leaves = (ops.tree_attention(tree, one, self._device) for one in queries)
            self._attentions[tree] = all_rows, leaves
        return self._attentions[tree]

    @property
    def packed_bytes(self) -> int:
        """The copies of weights."""
        return sum(one.packed_bytes for linears in self.linears for one in linears.all())


@dataclass(frozen=True)
class BlockLinears:
    """The linear layers of a block."""

    qkv: FrozenLinear  # in the last layer of key and value alone
    leaf_q: FrozenLinear | None  # there, and only if it is not the first as well: of the EOT rows' queries
    out_proj: FrozenLinear
    fc: FrozenLinear
    proj: FrozenLinear

    def all(self) -> Iterator[FrozenLinear]:
        yield from (self.qkv, self.out_proj, self.fc, self.proj)
        if self.leaf_q is not None:
            yield self.leaf_q


def _block_linears(block: TransformerBlock, layer: int, last: int, ops: Ops) -> BlockLinears:
    d = block.out_proj.weight.shape[0]
    skipped = d if layer == last else 0
    qkv = Affine(block.in_proj.weight[skipped:], block.in_proj.bias[skipped:])
    leaf_q = Affine(block.in_proj.weight[:d], block.in_proj.bias[:d])
    # Layer 0 projects the few context rows alone, and the last layer is for the EOT rows: not worth a packed copy.
    linear = partial(ops.frozen_linear, packed=layer < last)
    return BlockLinears(
        qkv=linear(qkv) if layer > 0 else ops.frozen_linear(qkv, packed=False),
        leaf_q=linear(leaf_q) if 0 < layer == last else None,
        out_proj=linear(block.out_proj),
        fc=linear(block.fc),
        proj=linear(block.proj),
    )


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(node: Any, tower: FusedTower, lease: Lease, *tensors: Tensor | None) -> Tensor:
        contexts = ContextRows.of(tensors)
        node.tower, node.lease, node.versions = tower, lease, tower.constants.weights.versions()
        node.like = contexts.types()
        node.save_for_backward(lease.owner())
        with own_types(contexts.shift.device):
            acts = tower.lay_out(contexts.batch, lease.memory)
            with acts.checked_once("forward", *node.like):
                return _forward(tower, contexts, acts)

    @staticmethod
    def backward(node: Any, grad_features: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UserError(
                "The engine has no second derivative (create_graph=True); build the model with backend='torch' for it."
            )
        _ = node.saved_tensors  # torch refuses a second backward over a graph that was not retained
        tower: FusedTower = node.tower
        tower.constants.weights.check_unchanged(node.versions)
        device = grad_features.device
        gradients = ContextRows.of(
            [
                None if like is None else torch.empty(like[0], dtype=like[1], device=device)
                for like in node.like
            ]
        )
        with own_types(device):
            acts = tower.lay_out(gradients.batch, node.lease.memory)
            with acts.checked_once("backward", *node.like):
                _backward(tower, grad_features, acts, gradients)
        return None, None, *gradients.tensors()


def _forward(tower: FusedTower, contexts: ContextRows, acts: Activations) -> Tensor:
    c, w, first = tower.constants, tower.constants.weights, acts.layers[0]
    batch, m, d = acts.batch, c.tree.n_ctx, w.width
    vectors = None if contexts.vectors is None else contexts.vectors.contiguous()
    parts = vectors, contexts.shift.contiguous(), c.positions
    h, ln_1 = acts.rows("h", batch * m, d), w.blocks[0].ln_1
    tower.ops.assemble_prompts_fwd(
        *parts, ln_1.weight, ln_1.bias, ln_1.eps, first.x, h.view(batch, m, d), *first.stats_1
    )
    if contexts.deep:
        _layers_forward(tower, acts, contexts.deep)
    else:
        acts.repeat(partial(_layers_forward, tower, acts), "forward")
    features = acts.x_out.new_empty(len(acts.x_out), w.projection.weight.shape[1])
    rows = acts.rows("o", *acts.x_out.shape)
    torch.addmm(w.projection.bias, rows, w.projection.weight, out=features)
    return features.view(batch, -1, features.shape[1])


def _layers_forward(tower: FusedTower, acts: Activations, deep: Sequence[Tensor] = ()) -> None:
    """From the first LayerNorm of the context rows, in "h", to the last one of the leaves, in "o"."""
    c, w, linears = tower.constants, tower.constants.weights, tower.shared.linears
    batch, d, last = acts.batch, w.width, len(w.blocks) - 1
    linears[0].qkv.forward(acts.rows("h", batch * c.tree.n_ctx, d), acts.layers[0].qkv)
    for layer, (block, own, a) in enumerate(zip(w.blocks, linears, acts.layers, strict=True)):
        if 1 <= layer <= len(deep):
            _replace_context(tower, acts, layer, deep[layer - 1])
        if layer == last:
            _leaf_queries(tower, acts, a, own, block.ln_1)
        o = acts.rows("o", len(a.x_mid), d)
        attention = tower.leaf_attention if layer == last else tower.attention
        attention.forward((a.q, a.k, a.v, *c.sos_kv[layer], w.heads), o.view(batch, -1, d))
        following = acts.layers[layer + 1] if layer < last else None
        for p in acts.panels(len(o)):
            h = acts.rows("h", len(o[p]), d)
            g = acts.rows("g", len(o[p]), block.fc.weight.shape[0])
            # x_mid = x + W_o attention(q, k, v) + b_o;  u = W_f LN_2(x_mid) + b_f
            own.out_proj.forward_norm(o[p], a.residual[p], a.x_mid[p], block.ln_2, h, *_part(a.stats_2, p))
            own.fc.forward_activation(h, w.activation, None if a.u is None else a.u[p], g)
            # x = x_mid + W_p act(u) + b_p, and its LayerNorm for the next layer, or the final one
            if following is None:
                stats = _part(acts.stats_out, p)
                own.proj.forward_norm(g, a.x_mid[p], acts.x_out[p], w.ln_final, o[p], *stats)
            else:
                norm, stats = w.blocks[layer + 1].ln_1, _part(following.stats_1, p)
                own.proj.forward_norm(g, a.x_mid[p], following.x[p], norm, h, *stats)
                linears[layer + 1].qkv.forward(h, following.qkv[p])


def _part(stats: Statistics, panel: slice) -> Statistics:
    return stats[0][panel], stats[1][panel]


def _replace_context(tower: FusedTower, acts: Activations, layer: int, prompt: Tensor) -> None:
    """The layer's context rows become those of a deep prompt (B, M, d), with all that was computed of them."""
    a, ln_1, (batch, m, d) = acts.layers[layer], tower.constants.weights.blocks[layer].ln_1, prompt.shape
    x = acts.context_of(a.x)
    x.copy_(prompt)
    h, qkv = acts.rows("h", batch * m, d), acts.rows("g", batch * m, a.qkv.shape[1])
    stats = acts.floats.get("statistics of a prompt", 2, batch * m)
    tower.ops.layer_norm_fwd(x, None, None, ln_1.weight, ln_1.bias, ln_1.eps, h.view(x.shape), *stats)
    tower.shared.linears[layer].qkv.forward(h, qkv)
    for whole, part in zip((a.qkv, *a.stats_1), (qkv, *stats), strict=True):
        acts.context_of(whole).copy_(part.view(batch, m, *part.shape[1:]))


def _leaf_queries(
    tower: FusedTower, acts: Activations, a: LayerActivations, own: BlockLinears, ln_1: Affine
) -> None:
    """The EOT rows of the last layer's x, to be added to the attention's output, and their queries."""
    c, d = tower.constants, a.residual.shape[1]
    residual = a.residual.view(acts.batch, -1, d)
    if own.leaf_q is None:  # the first layer is the last: they are constants
        residual.copy_(c.node_rows[c.leaves])
        return
    assert isinstance(a.q, Tensor)
    tower.ops.gather_rows(a.x.view(acts.batch, -1, d), tower.leaf_rows, residual)
    h = acts.rows("h", len(a.residual), d)
    tower.ops.layer_norm_fwd(a.residual, None, None, ln_1.weight, ln_1.bias, ln_1.eps, h, *a.stats_q)
    own.leaf_q.forward(h, a.q.view(-1, d))


def _backward(tower: FusedTower, grad_features: Tensor, acts: Activations, gradients: ContextRows) -> None:
    """Writes the gradients of the contexts' parts."""
    w = tower.constants.weights
    h = acts.rows("h", *acts.x_out.shape)
    torch.mm(grad_features.flatten(0, 1), w.projection.weight.T, out=h)
    if gradients.deep:
        _layers_backward(tower, acts, gradients.deep)
    else:
        acts.repeat(partial(_layers_backward, tower, acts), "backward")
    tower.ops.assemble_prompts_bwd(_grad_context(acts), gradients.vectors, gradients.shift)


def _layers_backward(tower: FusedTower, acts: Activations, deep: Sequence[Tensor] = ()) -> None:
    """From the gradient of the last LayerNorm's result, in "h", to that of the context rows.

    Args:
        deep: where the gradients of deep prompts are written.
    """
    w, ops = tower.constants.weights, tower.ops
    d, last = w.width, len(w.blocks) - 1
    h = acts.rows("h", *acts.x_out.shape)
    grad_x = acts.rows("grad_leaf", *acts.x_out.shape)
    ops.layer_norm_bwd(h, acts.x_out, w.ln_final.weight, *acts.stats_out, grad_x, accumulate=False)
    for layer in range(last, -1, -1):
        block, own, a = w.blocks[layer], tower.shared.linears[layer], acts.layers[layer]
        assert a.u is not None
        grad_o = acts.rows("o", len(grad_x), d)
        for p in acts.panels(len(grad_x)):
            # grad x += LN_2'(W_f^T (act'(u) * W_p^T grad x)): now that of x_mid. Then grad o = W_o^T grad x_mid.
            h = acts.rows("h", len(grad_x[p]), d)
            grad_u = acts.rows("g", len(grad_x[p]), a.u.shape[1])
            own.proj.backward_activation(grad_x[p], a.u[p], w.activation, grad_u)
            norm = a.x_mid[p], block.ln_2.weight, *_part(a.stats_2, p)
            own.fc.backward(grad_u, h)
            ops.layer_norm_bwd(h, *norm, grad_x[p], accumulate=True)
            own.out_proj.backward(grad_x[p], grad_o[p])
        grad_qkv = acts.rows("grad_qkv", *a.qkv.shape)
        grad_q = _attention_backward(tower, acts, layer, grad_o, grad_qkv)
        if layer == 0:
            _context_backward(tower, acts, grad_qkv)
        elif layer < last:
            _qkv_backward(tower, acts, layer, grad_qkv, grad_x, accumulate=True)
        else:
            grad_leaf, grad_x = grad_x, acts.rows("grad_x", *a.x.shape)
            _qkv_backward(tower, acts, layer, grad_qkv, grad_x, accumulate=False)
            # The EOT rows have queries, and a residual, as well.
            assert own.leaf_q is not None and grad_q is not None
            h = acts.rows("h", *grad_leaf.shape)
            norm = a.residual, block.ln_1.weight, *a.stats_q
            own.leaf_q.backward(grad_q.view(-1, d), h)
            ops.layer_norm_bwd(h, *norm, grad_leaf, accumulate=True)
            ops.add_rows(grad_leaf.view(acts.batch, -1, d), tower.leaf_rows, grad_x.view(acts.batch, -1, d))
        if 1 <= layer <= len(deep):
            of_context = acts.context_of(grad_x)
            deep[layer - 1].copy_(of_context)
            of_context.zero_()


def _attention_backward(
    tower: FusedTower, acts: Activations, layer: int, grad_o: Tensor, grad_qkv: Tensor
) -> Tensor | None:
    """Writes the gradients of the layer's query, key and value rows. Returns that of the EOT rows' queries, which in
    the last layer are not among those: (B, Q, d)."""
    c, a, batch, d = tower.constants, acts.layers[layer], acts.batch, grad_o.shape[1]
    first, last, heads = layer == 0, layer == len(acts.layers) - 1, c.weights.heads
    *grad_q_of_rows, grad_k, grad_v = grad_qkv.view(batch, -1, grad_qkv.shape[1]).split(d, dim=-1)
    leaf_q = acts.scratch.get("grad_q", batch, len(c.leaves), d) if last and not first else None
    attention = tower.leaf_attention if last else tower.attention
    attention.backward(
        grad_o.view(batch, -1, d), (a.q, a.k, a.v, *c.sos_kv[layer], heads),
        leaf_q if last else grad_q_of_rows[0], grad_k, grad_v,
        acts.floats.get("attention", attention.workspace_floats(batch, heads, d // heads)),
        context_only=first,
    )  # fmt: skip
    return leaf_q


def _qkv_backward(
    tower: FusedTower, acts: Activations, layer: int, grad_qkv: Tensor, grad_x: Tensor, *, accumulate: bool
) -> None:
    """grad x (+)= LN_1'(W_qkv^T grad qkv); in the last layer of k and v alone."""
    a, ln_1 = acts.layers[layer], tower.constants.weights.blocks[layer].ln_1
    for p in acts.panels(len(grad_x)):
        h = acts.rows("h", *grad_x[p].shape)
        norm = a.x[p], ln_1.weight, *_part(a.stats_1, p)
        tower.shared.linears[layer].qkv.backward(grad_qkv[p], h)
        tower.ops.layer_norm_bwd(h, *norm, grad_x[p], accumulate=accumulate)


def _context_backward(tower: FusedTower, acts: Activations, grad_qkv: Tensor) -> None:
    """From layer 0's query, key and value of the context rows, and what goes past its attention, to these rows."""
    a, batch, m = acts.layers[0], acts.batch, tower.constants.tree.n_ctx
    h = acts.rows("h", batch * m, a.x.shape[-1])
    tower.shared.linears[0].qkv.backward(grad_qkv, h)
    ln_1 = tower.constants.weights.blocks[0].ln_1
    # In a single layer the context rows end in their keys and values.
    passed_on = len(acts.layers) > 1
    norm = a.x, ln_1.weight, *a.stats_1
    tower.ops.layer_norm_bwd(h, *norm, _grad_context(acts), accumulate=passed_on)


def _grad_context(acts: Activations) -> Tensor:
    """(B, M, d) the gradient of the context rows, as layer 0 leaves it."""
    batch, m, d = acts.layers[0].x.shape
    rows = len(acts.layers[1].x) if len(acts.layers) > 1 else batch * m  # what the layers after it pass on to
    return acts.rows("grad_x", rows, d).view(batch, -1, d)[:, :m]
