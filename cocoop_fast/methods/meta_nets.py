"""M Meta-Nets: the straightforward design that CoCoOp's single Meta-Net replaces (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.engine.contexts import Contexts, ShiftedContext
from cocoop_fast.methods.base import EngineOptions, LearnedPromptCLIP
from cocoop_fast.methods.cocoop import MetaNet
from cocoop_fast.methods.learner import ContextLearner, master_dtype


class MetaNetsLearner(ContextLearner):
    """v_m(x) = v_m + h_m(x): a Meta-Net for each context vector. Keys ``meta_nets.<m>.linear1.*`` and so on.

    Args:
        cfg, classnames, clip_model: as for :class:`cocoop_fast.PromptLearner`.
    """

    section = "COCOOP"

    def __init__(self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__(cfg, classnames, clip_model)
        weights = self._frozen.text_weights()
        nets = (MetaNet(self._frozen.embed_dim, self._frozen.width) for _ in range(self.n_ctx))
        self.meta_nets = nn.ModuleList(nets).to(weights.device, master_dtype(weights.dtype))

    def contexts(self, image_features: Tensor) -> Contexts:
        """From (B, E) unit-length image features, in parts; with class-specific contexts the sum, (B, K, M, d)."""
        features = image_features.to(self.ctx.dtype)
        shift = torch.stack([net(features) for net in self.meta_nets], dim=1)  # (B, M, d)
        return self.ctx + shift[:, None] if self.ctx.ndim == 3 else ShiftedContext(self.ctx, shift)


class MetaNetsCLIP(LearnedPromptCLIP):
    """CoCoOp with M Meta-Nets.

    Args:
        cfg, classnames, clip_model, engine: as for :class:`cocoop_fast.CustomCLIP`.
    """

    prompt_learner: MetaNetsLearner

    def __init__(
        self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel, **engine: Unpack[EngineOptions]
    ) -> None:
        super().__init__(clip_model, MetaNetsLearner(cfg, classnames, clip_model), **engine)
