"""What the rows of CLIP's text transformer go through, in plain torch, and which of them are constants."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine, TextWeights, TransformerBlock
from cocoop_fast.engine.class_rows import ClassRows
from cocoop_fast.ops.activation import activation_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref
from cocoop_fast.ops.path_attention import path_attention_ref
from cocoop_fast.prompts.tree import ClassTree


def qkv_rows(
    x: Tensor, block: TransformerBlock, heads: int, query_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., R, d) rows to their query, key and value, (..., R, H, D) each; queries of `query_rows` only."""
    normed = layer_norm_ref(x, block.ln_1)
    if query_rows is None:
        qkv = linear_ref(normed, block.in_proj)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
        return q, k, v
    d = x.shape[-1]
    weight, bias = block.in_proj.weight, block.in_proj.bias
    q = linear_ref(normed[..., query_rows, :], Affine(weight[:d], bias[:d])).unflatten(-1, (heads, -1))
    k, v = linear_ref(normed, Affine(weight[d:], bias[d:])).unflatten(-1, (2, heads, -1)).unbind(-3)
    return q, k, v


def finish_block(x: Tensor, o: Tensor, block: TransformerBlock, activation: str) -> Tensor:
    """From attention outputs o (..., H, D) to the block's output: both residual branches."""
    x = x + linear_ref(o.flatten(-2), block.out_proj)
    u = linear_ref(layer_norm_ref(x, block.ln_2), block.fc)
    return x + linear_ref(activation_ref(u, activation), block.proj)


def project(x: Tensor, weights: TextWeights) -> Tensor:
    """(..., d) EOT rows to (..., E) text features."""
    projection = Affine(weights.projection.weight.T, weights.projection.bias)
    return linear_ref(layer_norm_ref(x, weights.ln_final), projection)


def own_types(device: torch.device) -> AbstractContextManager[object]:
    """The engine computes in the dtype of its weights: autocast, where it is on, ends at its door."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def current_autocast(device: torch.device) -> torch.autocast:
    """Autocast as it is now, for a backward to run under, which does not do so by itself."""
    kind = device.type
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))


@dataclass(frozen=True, eq=False)
class TowerConstants:
    """What a model and a class tree fix once and for all.

    The rows of the tree are S learnable ones and T tokens; in a standard tree S = M and T = N, in this order.
    """

    weights: TextWeights
    tree: ClassTree
    learnable: Tensor  # (S,) rows that are context vectors
    slots: Tensor  # (S,) which ones
    positions: Tensor  # (S, d) their position embeddings
    # (1 + C, H, D) by layer: key and value of SOS and of the tokens that no context precedes
    fixed_kv: tuple[tuple[Tensor, Tensor], ...]
    leaves: Tensor  # (K',) distinct EOT nodes
    leaf_of_class: Tensor  # (K,)

    @cached_property
    def node_rows(self) -> Tensor:
        """(T, d): layer-0 input of the tokens, token + position embedding."""
        tokens = self.tree.slot < 0
        return _embed(self.weights, self.tree.token[tokens], _node_places(self.tree)[tokens])

    @cached_property
    def node_qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H, D) each: layer 0's query, key and value of the tokens."""
        with torch.no_grad(), own_types(self.weights.device):
            return qkv_rows(self.node_rows, self.weights.blocks[0], self.weights.heads)

    @cached_property
    def classes(self) -> ClassRows:
        """Which leaf's features each class has."""
        return ClassRows(self.tree.leaf_of_class, self.weights.device)

    @property
    def nbytes(self) -> int:
        """Of those that grow with the tree."""
        return sum(one.nbytes for one in (self.node_rows, *self.node_qkv))

    def part(self, tree: ClassTree) -> TowerConstants:
        """The same for a subtree of the tree, by :meth:`ClassTree.subtree`."""
        return compute_constants(self.weights, tree, self.fixed_kv)

    def on_meta(self, tree: ClassTree) -> TowerConstants:
        """The shapes alone, for this tree or a subtree of it."""
        fixed_kv = tuple((k.to("meta"), v.to("meta")) for k, v in self.fixed_kv)
        return compute_constants(self.weights.to(torch.device("meta")), tree, fixed_kv)

    @cached_property
    def sos_kv(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(H, D) key and value of SOS in each layer."""
        return tuple((k[0], v[0]) for k, v in self.fixed_kv)


def compute_constants(
    weights: TextWeights, tree: ClassTree, fixed_kv: tuple[tuple[Tensor, Tensor], ...] | None = None
) -> TowerConstants:
    """Evaluate the rows that no context reaches; layer 0's constants follow when they are asked for.

    Args:
        weights: of the text tower.
        tree: of the prompts.
        fixed_kv: those rows' keys and values, if they are known.
    """
    device = weights.device
    position = weights.positional_embedding.to(weights.dtype)
    slot = torch.cat([torch.arange(tree.n_ctx), tree.slot])
    place = torch.cat([1 + torch.arange(tree.n_ctx), _node_places(tree)])
    learnable = (slot >= 0).nonzero()[:, 0]
    return TowerConstants(
        weights=weights,
        tree=tree,
        learnable=learnable.to(device),
        slots=slot[learnable].to(device),
        positions=position[place[learnable].to(device)],
        fixed_kv=_fixed_rows(weights, tree) if fixed_kv is None else fixed_kv,
        leaves=tree.leaves.to(device),
        leaf_of_class=tree.leaf_of_class.to(device),
    )


def _node_places(tree: ClassTree) -> Tensor:
    """(N,) positions of the nodes in their prompts."""
    return 1 + tree.n_ctx + tree.depth


def _fixed_rows(weights: TextWeights, tree: ClassTree) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values, in each layer, of SOS and of the tokens that no context precedes."""
    constants = tree.constants
    sos = _embed(weights, torch.tensor([tree.sos]), torch.zeros(1, dtype=torch.int64))
    x = _embed(weights, constants.token, 1 + constants.depth)
    paths = constants.row_paths.to(weights.device)
    fixed_kv = []
    for block in weights.blocks:
        _, sos_k, sos_v = qkv_rows(sos, block, weights.heads)
        q, k, v = qkv_rows(x, block, weights.heads)
        fixed_kv.append((torch.cat([sos_k, k]), torch.cat([sos_v, v])))
        sos = finish_block(sos, sos_v, block, weights.activation)  # it sees itself alone: attention returns v
        if len(constants):
            o = path_attention_ref(q[None], k[None], v[None], sos_k, sos_v, paths)
            x = finish_block(x, o[0], block, weights.activation)
    return tuple(fixed_kv)


def _embed(weights: TextWeights, token: Tensor, place: Tensor) -> Tensor:
    """(n,) token ids at (n,) positions to layer-0 rows (n, d)."""
    parts = ((weights.token_embedding, token), (weights.positional_embedding, place))
    embedded, position = (table[index.to(weights.device)].to(weights.dtype) for table, index in parts)
    return embedded + position
