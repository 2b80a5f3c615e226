"""What the engine is compared with: the dense oracle, what careful users would write, and the floor of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.clip.frozen import ClipModel, TextWeights
from cocoop_fast.engine.constants import finish_block, project
from cocoop_fast.engine.contexts import dense_contexts
from cocoop_fast.measure.problem import Problem
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.cocoop import PromptLearner
from cocoop_fast.ops.assemble_prompts import assemble_dense_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref
from cocoop_fast.reference import DensePromptedCLIP, encode_prompts


class DenseCoOp(DensePromptedCLIP):
    """The reference's CoOp: the K prompts are encoded once for the whole batch, since no image changes them."""

    def logits(self, image_features: Tensor) -> Tensor:
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        ctx = self.prompt_learner.ctx
        prompts = torch.stack([torch.cat([e[:1], ctx, e[1 + len(ctx) :]]) for e in self.embedding])
        text = encode_prompts(self.clip_model, prompts, self.tokens)
        text = text / text.norm(dim=-1, keepdim=True)
        return self.logit_scale.exp() * image_features @ text.T


def dense_oracle(
    problem: Problem, kind: type[DensePromptedCLIP] = DensePromptedCLIP, *, conditional: bool = True
) -> DensePromptedCLIP:
    """reference.py with the common parameters: 77 tokens a prompt. CoCoOp, or CoOp if not `conditional`."""
    spec = problem.spec
    model = kind(problem.clip_model, spec.classes, ctx_init=spec.ctx_init, conditional=conditional)
    keys = model.prompt_learner.state_dict()
    model.prompt_learner.load_state_dict({key: problem.learned[key] for key in keys})
    model.prompt_learner.train()
    return model


class TruncatedCLIP(PromptedCLIP):
    """CoCoOp with every prompt cut (or padded) to the longest, all images in one batch: what a careful user writes.

    Args:
        problem: what to compute.
        compiled: whether the text encoder goes through ``torch.compile``.
    """

    prompt_learner: PromptLearner
    ends: Tensor
    prefix: Tensor
    suffix: Tensor

    def __init__(self, problem: Problem, *, compiled: bool = False) -> None:
        super().__init__(problem.clip_model, len(problem.spec.classes))
        self.prompt_learner = learner = problem.learner()
        self.clip_model: ClipModel = problem.clip_model
        self.length = problem.longest
        self.register_buffer("ends", problem.lengths - 1, persistent=False)
        self.register_buffer("prefix", learner.token_prefix[:, 0], persistent=False)
        suffix = learner.token_suffix[:, : self.length - 1 - learner.n_ctx].clone()
        self.register_buffer("suffix", suffix, persistent=False)
        # One shape only: dynamic shapes would cost speed that this baseline should not lose.
        self.encode_contexts = torch.compile(self.encode, dynamic=False) if compiled else self.encode

    def encode(self, contexts: Tensor) -> Tensor:
        """(B, M, d) contexts to (B, K, E) text features."""
        clip, length = self.clip_model, self.length
        prompts = assemble_dense_ref(contexts, self.prefix, self.suffix)  # (B, K, L', d)
        batch, classes = prompts.shape[:2]
        position = clip.positional_embedding[:length]
        x = prompts.flatten(0, 1).to(position.dtype) + position
        x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
        x = x.unflatten(0, (batch, classes))[:, torch.arange(classes, device=x.device), self.ends]
        return clip.ln_final(x) @ clip.text_projection

    def text_features(self, image_features: Tensor) -> Tensor:
        return self.encode_contexts(dense_contexts(self.prompt_learner.contexts(image_features)))


class PaddingFreeCLIP(PromptedCLIP):
    """CoCoOp over the real tokens of all prompts, end to end in one (tokens, d) matrix: an expert's work of a day.

    Every prompt still computes its own context rows. Linear layers see real tokens only; attention pads them to
    (prompts, L') and back. In the last layer only EOT rows go on after attention. n tokens of one image's prompts,
    T = B n.

    Args:
        problem: what to compute.
    """

    prompt_learner: PromptLearner

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.clip_model, len(problem.spec.classes))
        self.prompt_learner = problem.learner()
        self.weights = w = problem.weights
        m, longest, lengths = problem.tree.n_ctx, problem.longest, problem.lengths
        device = lengths.device
        real = torch.arange(longest, device=device) < lengths[:, None]  # (K, L')
        starts = lengths.cumsum(0) - lengths
        self.embedded = (
            w.token_embedding[problem.tokens[:, :longest][real]]
            + w.positional_embedding[:longest].expand(len(lengths), -1, -1)[real]
        )  # (n, d)
        self.context_slots = (starts[:, None] + torch.arange(1, 1 + m, device=device)).flatten()  # (K M,)
        self.context_positions = w.positional_embedding[1 : 1 + m]
        self.real = real.flatten().nonzero()[:, 0]  # (n,) place of each token among the K L' padded ones
        self.ends = (
            torch.arange(len(lengths), device=device) * longest + lengths - 1
        )  # (K,) EOT among the padded places
        self.eot = starts + lengths - 1  # (K,) EOT among the n tokens
        self.longest = longest

    def text_features(self, image_features: Tensor) -> Tensor:
        contexts = dense_contexts(self.prompt_learner.contexts(image_features))  # (B, M, d)
        batch, n, w = len(contexts), len(self.embedded), self.weights
        places = self.n_classes * self.longest
        spread = (contexts + self.context_positions).repeat(1, self.n_classes, 1)
        x = self.embedded.repeat(batch, 1, 1)
        x = x.index_copy(1, self.context_slots, spread.to(x.dtype))
        x = x.flatten(0, 1)  # (T, d)
        real = _every_image(self.real, places, batch)
        for layer, block in enumerate(w.blocks):
            qkv = linear_ref(layer_norm_ref(x, block.ln_1), block.in_proj)
            # Zeros beyond a prompt's end, where causal attention never looks.
            padded = qkv.new_zeros(batch * places, qkv.shape[1]).index_copy_(0, real, qkv)
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
    return (torch.arange(batch, device=index.device)[:, None] * stride + index).flatten()


class GemmFloor:
    """Forward and input-gradient GEMMs of all R rows in all layers, into buffers that exist already.

    Nothing is skipped (the engine skips about 7 percent: layer 0's constants, all but the EOT rows in the last
    layer), nothing is added: no bias, no residual, no attention. Inputs are fixed random rows.

    Args:
        weights: the text tower.
        rows: B R.
    """

    def __init__(self, weights: TextWeights, rows: int) -> None:
        self.weights = [
            layer.weight for b in weights.blocks for layer in (b.in_proj, b.out_proj, b.fc, b.proj)
        ]
        generator = torch.Generator().manual_seed(0)
        widths = {width for weight in self.weights for width in weight.shape}
        self.rows = {
            width: torch.randn(rows, width, generator=generator).to(self.weights[0])
            for width in sorted(widths)
        }
        self.out = {width: torch.empty_like(one) for width, one in self.rows.items()}

    def forward(self) -> None:
        """The four linear layers of each block: y = x W^T."""
        for weight in self.weights:
            torch.mm(self.rows[weight.shape[1]], weight.T, out=self.out[weight.shape[0]])

    def backward(self) -> None:
        """Their input gradients: x = y W."""
        for weight in reversed(self.weights):
            torch.mm(self.rows[weight.shape[0]], weight, out=self.out[weight.shape[1]])

    def step(self) -> None:
        self.forward()
        self.backward()
