"""What the rows of CLIP's text transformer go through, in plain torch, and which of them are constants."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cocoop_fast.class_tree import ClassTree
from cocoop_fast.clip import Affine, TextBlock, TextWeights
from cocoop_fast.ops.activation import activation_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref


def qkv_rows(
    x: Tensor, block: TextBlock, heads: int, query_rows: Tensor | None = None
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


def finish_block(x: Tensor, o: Tensor, block: TextBlock, activation: str) -> Tensor:
    """From attention outputs o (..., H, D) to the block's output: both residual branches."""
    x = x + linear_ref(o.flatten(-2), block.out_proj)
    u = linear_ref(layer_norm_ref(x, block.ln_2), block.fc)
    return x + linear_ref(activation_ref(u, activation), block.proj)


def project(x: Tensor, weights: TextWeights) -> Tensor:
    """(..., d) EOT rows to (..., E) text features."""
    projection = Affine(weights.projection.weight.T, weights.projection.bias)
    return linear_ref(layer_norm_ref(x, weights.ln_final), projection)


@dataclass(frozen=True, eq=False)
class TowerConstants:
    """What a model and a class list fix once and for all."""

    weights: TextWeights
    tree: ClassTree
    positions: Tensor  # (M, d) position embeddings of the context
    node_rows: Tensor  # (N, d) layer-0 input of the nodes: token + position embedding
    node_qkv: tuple[Tensor, Tensor, Tensor]  # (N, H, D) each: layer 0's query, key, value of the nodes
    sos_kv: tuple[tuple[Tensor, Tensor], ...]  # (H, D) key and value of SOS in each layer
    leaves: Tensor  # (K',) distinct EOT nodes
    leaf_of_class: Tensor  # (K,)


def compute_constants(weights: TextWeights, tree: ClassTree) -> TowerConstants:
    """Evaluate the rows that no context reaches: SOS in every layer, the nodes up to layer 0's q, k and v."""
    dtype, device = weights.dtype, weights.device
    embed = weights.token_embedding
    position = weights.positional_embedding.to(dtype)
    node_rows = embed[tree.token.to(device)].to(dtype) + position[(1 + tree.n_ctx + tree.depth).to(device)]
    sos = (embed[tree.sos].to(dtype) + position[0])[None]
    sos_kv = []
    for block in weights.blocks:
        _, k, v = qkv_rows(sos, block, weights.heads)
        sos_kv.append((k[0], v[0]))
        sos = finish_block(sos, v, block, weights.activation)  # SOS sees itself alone: attention returns v
    return TowerConstants(
        weights=weights,
        tree=tree,
        positions=position[1 : 1 + tree.n_ctx],
        node_rows=node_rows,
        node_qkv=qkv_rows(node_rows, weights.blocks[0], weights.heads),
        sos_kv=tuple(sos_kv),
        leaves=tree.leaves.to(device),
        leaf_of_class=tree.leaf_of_class.to(device),
    )
