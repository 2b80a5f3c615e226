"""Two more ways to compute each distinct row once: what others built for prefix trees of prompts, brought to CoCoOp.

Both carry the same rows through everything but attention: SOS, the context rows and the nodes of each image, none of them
taken for constants. They differ in how a row attends to those above it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.engine.constants import compute_constants, finish_block, project
from cocoop_fast.engine.contexts import dense_contexts
from cocoop_fast.measure.problem import Problem
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.cocoop import PromptLearner
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref
from cocoop_fast.prompts.tree import ClassTree, RowPaths

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class SharedRowsCLIP(PromptedCLIP):
    """CoCoOp over the 1 + M + N rows of an image's prefix tree, by torch's operations.

    In the last layer only EOT rows go on after attention.

    Args:
        problem: what to compute.
    """

    prompt_learner: PromptLearner

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.clip_model, len(problem.spec.classes))
        self.prompt_learner = problem.learner()
        self.weights = w = problem.weights
        self.constants = c = compute_constants(w, problem.tree, fixed_kv=())
        self.sos = (w.token_embedding[c.tree.sos] + w.positional_embedding[0]).to(w.dtype)
        self.ends = 1 + c.tree.n_ctx + c.leaves  # of the distinct prompts, among the rows of an image

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o (B, H, R, D) of all rows from query, key and value of that shape, R = 1 + M + N."""
        raise NotImplementedError

    def text_features(self, image_features: Tensor) -> Tensor:
        contexts = dense_contexts(self.prompt_learner.contexts(image_features))  # (B, M, d)
        batch, w, c = len(contexts), self.weights, self.constants
        context_rows = contexts.to(w.dtype) + c.positions
        parts = self.sos.expand(batch, 1, -1), context_rows, c.node_rows.expand(batch, -1, -1)
        x = torch.cat(parts, dim=1)  # (B, R, d)
        for layer, block in enumerate(w.blocks):
            qkv = linear_ref(layer_norm_ref(x, block.ln_1), block.in_proj)
            q, k, v = qkv.unflatten(-1, (3, w.heads, -1)).permute(2, 0, 3, 1, 4)
            o = self.attend(q, k, v).transpose(1, 2)
            if layer == len(w.blocks) - 1:
                o, x = o[:, self.ends], x[:, self.ends]
            x = finish_block(x, o, block, w.activation)
        return project(x, w)[:, c.leaf_of_class]


class RadixCLIP(SharedRowsCLIP):
    """Token deduplication in the manner of RadixMLP: attention is left as it was, one sequence a prompt.

    Before attention the rows are copied to every prompt that has them, and the prompts padded to the longest; behind it, one
    of a row's copies is kept, since all are the same. Backward adds up the gradients of the copies.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        tree, device = problem.tree, problem.weights.device
        paths = tree.row_paths.rows[tree.leaf_of_class]
        paths = F.pad(torch.where(paths < 0, -1, 1 + paths), (1, 0), value=0)  # (K, L') with SOS in front
        self.copies = paths.clamp(min=0).to(device)  # beyond a prompt's end causal attention never looks
        self.kept = RowPaths.of(paths, paths[:, :0]).place.to(device)  # (R,) among the K L' copies

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, _, size = q.shape
        shape = batch, heads, *self.copies.shape, size
        q, k, v = (
            one.index_select(2, self.copies.flatten()).view(shape).transpose(1, 2).flatten(0, 1)
            for one in (q, k, v)
        )  # (B K, H, L', D)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        o = o.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)  # (B, H, K L', D)
        return o.index_select(2, self.kept)


class FlexCLIP(SharedRowsCLIP):
    """The tree's rows by torch's FlexAttention, with the tree as its block mask.

    On a GPU its kernels are compiled; on a CPU torch has its forward alone.
    """

    def __init__(self, problem: Problem) -> None:
        from torch.nn.attention.flex_attention import flex_attention  # slow to import

        super().__init__(problem)
        device = problem.weights.device
        self.mask = tree_block_mask(problem.tree, device)
        # One shape only, as for the baseline that is compiled whole.
        self.flex = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = self.flex(q, k, v, block_mask=self.mask)
        return o


def sees(tree: ClassTree, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a row (SOS, M context rows, N nodes) reads another one's key, as FlexAttention asks for it: subtrees are ranges,
    so a key is read by the rows from its own to its subtree's last."""
    above_all = torch.full((1 + tree.n_ctx,), 1 + tree.rows)
    subtree_end = torch.cat([above_all, 1 + tree.n_ctx + tree.subtree_end]).to(device)
    return lambda batch, head, query, key: (key <= query) & (query < subtree_end[key])


def tree_block_mask(tree: ClassTree, device: torch.device) -> BlockMask:
    """The block mask of a tree's rows, SOS first, for all images and heads."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows = 1 + tree.rows
    return create_block_mask(sees(tree, device), None, None, rows, rows, device=device)


def why_no_flex(problem: Problem) -> str | None:
    """Why a training step with FlexAttention is not possible there, or None."""
    if problem.weights.device.type == "cpu":
        return "torch's FlexAttention has no backward on a CPU"
    there = find_spec("torch.nn.attention.flex_attention")
    return None if there else "FlexAttention needs torch 2.5 or newer"
