"""Baselines that encode every prompt as a sequence of its own, with the CLIP model's own modules."""

from __future__ import annotations

import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.engine.contexts import dense_contexts
from cocoop_fast.measure.problem import Problem
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.cocoop import PromptLearner
from cocoop_fast.ops.assemble_prompts import assemble_dense_ref
from cocoop_fast.reference import DensePromptedCLIP, encode_prompts


def dense_oracle(problem: Problem, *, conditional: bool = True) -> DensePromptedCLIP:
    """reference.py: 77 tokens a prompt, one image at a time. CoCoOp, or CoOp if not `conditional`."""
    model = DensePromptedCLIP(
        problem.clip_model, problem.spec.classes, ctx_init=problem.spec.ctx_init, conditional=conditional
    )
    keys = model.prompt_learner.state_dict()
    model.prompt_learner.load_state_dict({key: problem.learned[key] for key in keys})
    model.prompt_learner.train()
    return model


class DenseCoOp(DensePromptedCLIP):
    """The reference's CoOp: the K prompts are encoded once for the whole batch, since no image changes them."""

    def logits(self, image_features: Tensor) -> Tensor:
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        ctx = self.prompt_learner.ctx
        prompts = torch.stack([torch.cat([e[:1], ctx, e[1 + len(ctx) :]]) for e in self.embedding])
        text = encode_prompts(self.clip_model, prompts, self.tokens)
        text = text / text.norm(dim=-1, keepdim=True)
        return self.logit_scale.exp() * image_features @ text.T


def dense_coop(problem: Problem) -> DenseCoOp:
    """CoOp of the reference with the common context."""
    model = dense_oracle(problem, conditional=False)
    model.__class__ = DenseCoOp
    assert isinstance(model, DenseCoOp)
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
        self.prompt_learner = problem.learner()
        self.clip_model: ClipModel = problem.clip_model
        self.length = problem.longest
        self.register_buffer("ends", problem.lengths - 1, persistent=False)
        learner = self.prompt_learner
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
        x = prompts.flatten(0, 1) + clip.positional_embedding[:length]
        x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
        x = x.unflatten(0, (batch, classes))[:, torch.arange(classes), self.ends]
        return clip.ln_final(x) @ clip.text_projection

    def text_features(self, image_features: Tensor) -> Tensor:
        return self.encode_contexts(dense_contexts(self.prompt_learner.contexts(image_features)))


def why_no_compiler() -> str | None:
    """Why torch.compile cannot work here, or None."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler"
    return None


def cross_entropy_step(model: Any, features: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, K) of a step, with the gradients of its loss left in the prompt learner."""
    for parameter in model.prompt_learner.parameters():
        parameter.grad = None
    logits = model.logits(features)
    F.cross_entropy(logits, labels).backward()
    return logits.detach()
