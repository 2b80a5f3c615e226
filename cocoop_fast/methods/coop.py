"""CoOp: one learned context for all images (Zhou et al., IJCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import Unpack

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.methods.base import EngineOptions, LearnedPromptCLIP
from cocoop_fast.methods.learner import ContextLearner


class CoOp(LearnedPromptCLIP):
    """CoOp with a context for all classes or for each, and the class name after, amid or before it.

    The context does not depend on the image, so a batch needs one pass over the class tree. The methods that shift it
    by the image are subclasses with another learner.

    Args:
        cfg: with the options of :class:`ContextLearner` in ``TRAINER.COOP``.
        classnames: K class names.
        clip_model: an open_clip or OpenAI CLIP with a causal, EOT-pooled text tower.
        engine: backend, memory_budget, prune_mass and text_dtype of :class:`LearnedPromptCLIP`.

    Raises:
        UserError: an unsupported model, class list or backend, or a budget or tau out of range.
    """

    learner: type[ContextLearner] = ContextLearner
    prompt_learner: ContextLearner

    def __init__(
        self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel, **engine: Unpack[EngineOptions]
    ) -> None:
        super().__init__(clip_model, self.learner(cfg, classnames, clip_model), **engine)
