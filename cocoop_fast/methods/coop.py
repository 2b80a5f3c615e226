"""CoOp: one learned context for all images (Zhou et al., IJCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cocoop_fast.class_tree import ClassTree
from cocoop_fast.clip import ClipModel, FrozenCLIP
from cocoop_fast.model import PromptedCLIP
from cocoop_fast.prompt_tokens import tokenize_prompts
from cocoop_fast.text_tower import TreeTextEncoder


class ContextLearner(nn.Module):
    """M context vectors, shared by all classes and all images.

    Args:
        ctx: (M, d) initial context.
    """

    def __init__(self, ctx: Tensor) -> None:
        super().__init__()
        self.ctx = nn.Parameter(ctx)


class CoOp(PromptedCLIP):
    """CoOp with a unified context and the class name at the end.

    The context does not depend on the image, so a batch needs one pass over the class tree.

    Args:
        cfg, classnames, clip_model, backend: as for :class:`cocoop_fast.CustomCLIP`.
    """

    prompt_learner: ContextLearner

    def __init__(
        self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel, *, backend: str = "auto"
    ) -> None:
        super().__init__(clip_model, len(classnames), backend=backend)
        options, frozen = cfg.TRAINER.COCOOP, FrozenCLIP(clip_model)
        prompts = tokenize_prompts(
            classnames, ctx_init=options.CTX_INIT, n_ctx=options.N_CTX, context_length=frozen.context_length
        )
        embed = frozen.text_weights().token_embedding
        if options.CTX_INIT:
            ctx = embed[prompts.tokens[0, 1 : 1 + prompts.n_ctx].to(embed.device)]
        else:
            ctx = nn.init.normal_(torch.empty(prompts.n_ctx, frozen.width), std=0.02)
        self.prompt_learner = ContextLearner(ctx.to(embed.device, frozen.dtype, copy=True))
        self.tree_encoder = TreeTextEncoder(
            clip_model, ClassTree(prompts.tokens, prompts.n_ctx), backend=backend
        )

    def text_features(self, image_features: Tensor) -> Tensor:
        return self.tree_encoder(self.prompt_learner.ctx[None])
