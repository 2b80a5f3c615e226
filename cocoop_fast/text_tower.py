"""CLIP's text transformer, evaluated once per distinct row of the K prompts.

Rows of an image: M context rows, then the N nodes of the class tree (R = M + N). SOS is a constant of the model
and no row at all. What is exact about this, and why, is in docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoop_fast.class_tree import ClassTree
from cocoop_fast.clip import Affine, FrozenCLIP, TextBlock, TextWeights
from cocoop_fast.errors import UserError
from cocoop_fast.ops.activation import activation_ref
from cocoop_fast.ops.dispatch import select_backend
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref
from cocoop_fast.ops.tree_attention import tree_attention_ref

# Without gradients nothing is kept, so images go through in groups of about this many rows: large enough for
# full GEMM speed, small enough that a test batch of 100 images and 1000 classes needs no memory of its own.
ROWS_PER_INFERENCE_PASS = 8192


class TreeTextEncoder(nn.Module):
    """Text features of K prompts for B contexts, sharing every row that is shared.

    Args:
        clip_model: an open_clip or OpenAI CLIP whose text tower is causal and EOT-pooled.
        tree: the class tree of the K prompts.
        backend: "auto" or the name of a backend of :mod:`cocoop_fast.ops.dispatch`.

    Raises:
        UserError: an unsupported text tower or backend, or a tree that does not fit the tower's context length.
    """

    def __init__(self, clip_model: nn.Module, tree: ClassTree, *, backend: str = "auto") -> None:
        super().__init__()
        self.frozen = FrozenCLIP(clip_model)
        self.tree = tree
        self._check_tree()
        weights = self.frozen.text_weights()
        self.backend = select_backend(weights.device, weights.dtype, backend)
        self._constants: _Constants | None = None

    def forward(self, ctx: Tensor) -> Tensor:
        """Encode the K prompts under each context.

        Args:
            ctx: (B, M, d) context vectors, differentiable; computed in the dtype of the model.

        Returns:
            (B, K, E) text features, not normalised.

        Raises:
            UserError: `ctx` has another shape or is not floating point.
        """
        expected = (self.tree.n_ctx, self.frozen.width)
        if ctx.ndim != 3 or tuple(ctx.shape[1:]) != expected or not ctx.is_floating_point():
            raise UserError(
                f"`ctx` must be a floating-point (B, M, d) tensor with (M, d) = {expected}, "
                f"got {ctx.dtype} of shape {tuple(ctx.shape)}."
            )
        constants = self._current_constants()
        if torch.is_grad_enabled() and ctx.requires_grad:
            return _encode(ctx, constants)
        group = max(1, ROWS_PER_INFERENCE_PASS // self.tree.rows)
        return torch.cat([_encode(part, constants) for part in ctx.split(group)])

    def extra_repr(self) -> str:
        return f"{self.tree}, backend={self.backend.name}"

    def _check_tree(self) -> None:
        longest = 1 + self.tree.n_ctx + self.tree.max_depth
        if longest > self.frozen.context_length:
            raise UserError(
                f"The longest prompt has {longest} tokens, but the text tower reads {self.frozen.context_length}; "
                "use a shorter context or class name."
            )
        highest = max(int(self.tree.token.max()), self.tree.sos)
        if highest >= self.frozen.vocab_size:
            raise UserError(
                f"The prompts use token id {highest}, but the text tower knows {self.frozen.vocab_size} tokens; "
                "tokenize them with the model's own tokenizer."
            )

    def _current_constants(self) -> _Constants:
        """The rows that do not depend on the context, recomputed only when a weight was changed or moved."""
        weights = self.frozen.text_weights()
        if self._constants is None or self._constants.weights is not weights:
            with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
                self._constants = _compute_constants(weights, self.tree)
        return self._constants


class TextEncoder(nn.Module):
    """The reference's dense text encoder: one transformer pass a prompt, here up to the last EOT only.

    Args:
        clip_model: an open_clip or OpenAI CLIP whose text tower is causal and EOT-pooled.
    """

    def __init__(self, clip_model: nn.Module) -> None:
        super().__init__()
        self.frozen = FrozenCLIP(clip_model)
        text = clip_model.text if isinstance(getattr(clip_model, "text", None), nn.Module) else clip_model
        self.transformer = text.transformer
        self.positional_embedding = text.positional_embedding
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.dtype

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor) -> Tensor:
        """Encode prompts given as embeddings.

        Args:
            prompts: (n, L, d) token embeddings, context included.
            tokenized_prompts: (n, L) integer ids; each row's largest is its EOT.

        Returns:
            (n, E) text features, not normalised.

        Raises:
            UserError: the shapes do not belong together.
        """
        if prompts.ndim != 3 or tuple(tokenized_prompts.shape) != tuple(prompts.shape[:2]):
            raise UserError(
                f"`prompts` must be (n, L, d) and `tokenized_prompts` (n, L), got {tuple(prompts.shape)} "
                f"and {tuple(tokenized_prompts.shape)}."
            )
        weights = self.frozen.text_weights()
        ends = tokenized_prompts.to(prompts.device).argmax(dim=-1)
        length = int(ends.max()) + 1  # nothing after the last EOT is ever read
        x = prompts[:, :length].to(weights.dtype) + weights.positional_embedding[:length].to(weights.dtype)
        for block in weights.blocks:
            q, k, v = _qkv(x, block, weights.heads)
            o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
            x = _finish_block(x, o.transpose(1, 2), block, weights.activation)
        return _project(x[torch.arange(len(x), device=x.device), ends], weights)


@dataclass(frozen=True, eq=False)
class _Constants:
    """What a model and a class list fix once and for all."""

    weights: TextWeights
    tree: ClassTree
    positions: Tensor  # (M, d) position embeddings of the context
    node_rows: Tensor  # (N, d) layer-0 input of the nodes: token + position embedding
    node_qkv: tuple[Tensor, Tensor, Tensor]  # (N, H, D) each: layer 0's query, key, value of the nodes
    sos_kv: tuple[tuple[Tensor, Tensor], ...]  # (H, D) key and value of SOS in each layer
    leaves: Tensor  # (K',) distinct EOT nodes
    leaf_of_class: Tensor  # (K,)


def _compute_constants(weights: TextWeights, tree: ClassTree) -> _Constants:
    dtype, device = weights.dtype, weights.device
    embed = weights.token_embedding
    position = weights.positional_embedding.to(dtype)
    node_rows = embed[tree.token.to(device)].to(dtype) + position[(1 + tree.n_ctx + tree.depth).to(device)]
    sos = (embed[tree.sos].to(dtype) + position[0])[None]
    sos_kv = []
    for block in weights.blocks:
        _, k, v = _qkv(sos, block, weights.heads)
        sos_kv.append((k[0], v[0]))
        sos = _finish_block(sos, v, block, weights.activation)  # SOS sees itself alone: attention returns v
    return _Constants(
        weights=weights,
        tree=tree,
        positions=position[1 : 1 + tree.n_ctx],
        node_rows=node_rows,
        node_qkv=_qkv(node_rows, weights.blocks[0], weights.heads),
        sos_kv=tuple(sos_kv),
        leaves=tree.leaves.to(device),
        leaf_of_class=tree.leaf_of_class.to(device),
    )


def _encode(ctx: Tensor, c: _Constants) -> Tensor:
    """(B, M, d) contexts to (B, K, E) text features."""
    w, m, batch = c.weights, c.tree.n_ctx, len(ctx)
    context_rows = ctx.to(w.dtype) + c.positions
    x = torch.cat([context_rows, c.node_rows.expand(batch, -1, -1)], dim=1)  # (B, R, d)
    last = len(w.blocks) - 1
    for layer, block in enumerate(w.blocks):
        rows = None if layer < last else m + c.leaves  # nothing but the EOT rows is read after the last layer
        if layer == 0:  # the nodes' query, key and value do not depend on the image
            parts = zip(_qkv(context_rows, block, w.heads), c.node_qkv, strict=True)
            q, k, v = (torch.cat([own, shared.expand(batch, -1, -1, -1)], dim=1) for own, shared in parts)
            q = q if rows is None else q[:, rows]
        else:
            q, k, v = _qkv(x, block, w.heads, query_rows=rows)
        x = x if rows is None else x[:, rows]
        o = tree_attention_ref(q, k, v, *c.sos_kv[layer], c.tree, None if rows is None else c.leaves)
        x = _finish_block(x, o, block, w.activation)
    return _project(x, w)[:, c.leaf_of_class]


def _qkv(
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


def _finish_block(x: Tensor, o: Tensor, block: TextBlock, activation: str) -> Tensor:
    """From attention outputs o (..., H, D) to the block's output: both residual branches."""
    x = x + linear_ref(o.flatten(-2), block.out_proj)
    u = linear_ref(layer_norm_ref(x, block.ln_2), block.fc)
    return x + linear_ref(activation_ref(u, activation), block.proj)


def _project(x: Tensor, weights: TextWeights) -> Tensor:
    """(..., d) EOT rows to (..., E) text features."""
    projection = Affine(weights.projection.weight.T, weights.projection.bias)
    return linear_ref(layer_norm_ref(x, weights.ln_final), projection)
