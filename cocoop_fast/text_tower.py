"""CLIP's text transformer, evaluated once per distinct row of the K prompts.

Rows of an image: M context rows, then the N nodes of the class tree (R = M + N). SOS is a constant of the model
and no row at all. What is exact about this, and why, is in docs/design.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoop_fast.class_tree import ClassTree
from cocoop_fast.clip import ClipModel, FrozenCLIP, text_module
from cocoop_fast.cpu_tower import CpuTower
from cocoop_fast.errors import UserError
from cocoop_fast.ops.dispatch import select_backend
from cocoop_fast.torch_tower import TorchTower
from cocoop_fast.tower_rows import compute_constants, finish_block, project, qkv_rows

Tower = TorchTower | CpuTower
TOWERS: dict[str, type[Tower]] = {"torch": TorchTower, "cpu": CpuTower}

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

    def __init__(self, clip_model: ClipModel, tree: ClassTree, *, backend: str = "auto") -> None:
        super().__init__()
        self.frozen = FrozenCLIP(clip_model)
        self.tree = tree
        self._check_tree()
        self._explicit_backend = backend
        self._tower: Tower | None = None
        weights = self.frozen.text_weights()
        self.backend = select_backend(weights.device, weights.dtype, backend)

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
        tower = self._current_tower()
        if torch.is_grad_enabled() and ctx.requires_grad:
            leaves = tower.encode(ctx)
        else:
            group = max(1, ROWS_PER_INFERENCE_PASS // self.tree.rows)
            leaves = torch.cat([tower.encode(part) for part in ctx.split(group)])
        return leaves[:, tower.constants.leaf_of_class]

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

    def _current_tower(self) -> Tower:
        """The tower with its constants, made anew only when a weight was changed or moved."""
        weights = self.frozen.text_weights()
        if self._tower is None or self._tower.constants.weights is not weights:
            self.backend = select_backend(weights.device, weights.dtype, self._explicit_backend)
            with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
                self._tower = TOWERS[self.backend.name](compute_constants(weights, self.tree))
        return self._tower


class TextEncoder(nn.Module):
    """The reference's dense text encoder: one transformer pass a prompt, here up to the last EOT only.

    Args:
        clip_model: an open_clip or OpenAI CLIP whose text tower is causal and EOT-pooled.
    """

    def __init__(self, clip_model: ClipModel) -> None:
        super().__init__()
        self.frozen = FrozenCLIP(clip_model)
        text = text_module(clip_model)
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
            q, k, v = qkv_rows(x, block, weights.heads)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (n, H, L, D)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = finish_block(x, o.transpose(1, 2), block, weights.activation)
        return project(x[torch.arange(len(x), device=x.device), ends], weights)
