"""M Meta-Nets: the straightforward design that CoCoOp's single Meta-Net replaces (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.methods.cocoop import MetaNet
from cocoop_fast.methods.coop import CoOp
from cocoop_fast.methods.learner import ContextLearner


class MetaNetsLearner(ContextLearner):
    """v_m(x) = v_m + h_m(x): a Meta-Net for each context vector. Keys ``meta_nets.<m>.linear1.*`` and so on.

    Args:
        cfg, classnames, clip_model: as for :class:`cocoop_fast.PromptLearner`.
    """

    section = "COCOOP"

    def __init__(self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__(cfg, classnames, clip_model)
        nets = (MetaNet(self._frozen.embed_dim, self._frozen.width) for _ in range(self.n_ctx))
        self.meta_nets = nn.ModuleList(nets).to(self.ctx)

    def compute_by(self, backend: str) -> None:
        for net in self.meta_nets:
            net.backend = backend  # type: ignore[assignment]

    def shift(self, image_features: Tensor) -> Tensor:
        """(B, E) to (B, M, d)."""
        seen = self.seen(image_features)
        return torch.stack([net(seen) for net in self.meta_nets], dim=1)


class MetaNetsCLIP(CoOp):
    """CoCoOp with M Meta-Nets. Its arguments are those of :class:`cocoop_fast.CustomCLIP`."""

    learner = MetaNetsLearner
    prompt_learner: MetaNetsLearner
