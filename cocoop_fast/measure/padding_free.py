"""The baseline of an expert with a day: no padding, but every prompt still computes its own context rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.engine.constants import finish_block, project
from cocoop_fast.engine.contexts import dense_contexts
from cocoop_fast.measure.problem import Problem
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.cocoop import PromptLearner
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref


class PaddingFreeCLIP(PromptedCLIP):
    """CoCoOp over the real tokens of all prompts, end to end in one (tokens, d) matrix.

    Linear layers see real tokens only; attention pads them to (prompts, L') and back. In the last layer only EOT
    rows go on after attention. n tokens of one image's prompts, T = B n.

    Args:
        problem: what to compute.
    """

    prompt_learner: PromptLearner

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.clip_model, len(problem.spec.classes))
        self.prompt_learner = problem.learner()
        self.weights = w = problem.weights
        m, longest, lengths = problem.tree.n_ctx, problem.longest, problem.lengths
        real = torch.arange(longest) < lengths[:, None]  # (K, L')
        starts = lengths.cumsum(0) - lengths
        self.embedded = (
            w.token_embedding[problem.tokens[:, :longest][real]]
            + w.positional_embedding[:longest].expand(len(lengths), -1, -1)[real]
        )  # (n, d)
        self.context_slots = (starts[:, None] + torch.arange(1, 1 + m)).flatten()  # (K M,)
        self.context_positions = w.positional_embedding[1 : 1 + m]
        self.real = real.flatten().nonzero()[:, 0]  # (n,) place of each token among the K L' padded ones
        # Where each padded place reads; beyond a prompt's end any row will do, as causal attention never looks there.
        self.source = (starts[:, None] + torch.arange(longest).minimum(lengths[:, None] - 1)).flatten()
        self.ends = torch.arange(len(lengths)) * longest + lengths - 1  # (K,) EOT among the padded places
        self.eot = starts + lengths - 1  # (K,) EOT among the n tokens
        self.longest = longest

    def text_features(self, image_features: Tensor) -> Tensor:
        contexts = dense_contexts(self.prompt_learner.contexts(image_features))  # (B, M, d)
        batch, n, w = len(contexts), len(self.embedded), self.weights
        places = len(self.source)
        spread = (contexts + self.context_positions).repeat(1, self.n_classes, 1)
        x = (
            self.embedded.repeat(batch, 1, 1).index_copy(1, self.context_slots, spread).flatten(0, 1)
        )  # (T, d)
        source = _every_image(self.source, n, batch)
        real = _every_image(self.real, places, batch)
        for layer, block in enumerate(w.blocks):
            qkv = linear_ref(layer_norm_ref(x, block.ln_1), block.in_proj)
            padded = _Pad.apply(qkv, source, real)
            q, k, v = padded.view(-1, self.longest, 3, w.heads, w.width // w.heads).permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)  # (B K, L', H, D)
            o = o.reshape(batch * places, w.heads, -1)
            if layer == len(w.blocks) - 1:
                o = _Pick.apply(o, _every_image(self.ends, places, batch))
                x = _Pick.apply(x, _every_image(self.eot, n, batch))
            else:
                o = _Pick.apply(o, real)
            x = finish_block(x, o, block, w.activation)
        return project(x, w).unflatten(0, (batch, -1))


class _Pad(torch.autograd.Function):
    """Rows to padded places. The places beyond a prompt's end have no gradient, so both ways are gathers."""

    @staticmethod
    def forward(node: Any, x: Tensor, source: Tensor, real: Tensor) -> Tensor:
        node.save_for_backward(real)
        return x.index_select(0, source)

    @staticmethod
    def backward(node: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (real,) = node.saved_tensors
        return grad.index_select(0, real), None, None


class _Pick(torch.autograd.Function):
    """Rows at distinct places; backward writes them back among zeros, without the atomics of an accumulation."""

    @staticmethod
    def forward(node: Any, x: Tensor, places: Tensor) -> Tensor:
        node.save_for_backward(places)
        node.count = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(node: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = node.saved_tensors
        return grad.new_zeros(node.count, *grad.shape[1:]).index_copy_(0, places, grad), None


def _every_image(index: Tensor, stride: int, batch: int) -> Tensor:
    """The same places in each of B images that lie `stride` rows apart, (B n,)."""
    return (torch.arange(batch)[:, None] * stride + index).flatten()
