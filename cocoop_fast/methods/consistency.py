"""What keeps learned prompts near hand-written ones: the anchor of a consistency loss, from an ensemble of templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.methods.cocoop import TextEncoder
from cocoop_fast.methods.zeroshot import mean_text_features
from cocoop_fast.ops.consistency import Anchor, Distance

# By distance: of text features and of logits, as published.
WEIGHTS: dict[str, tuple[float, float]] = {"l1": (25.0, 1.0), "cosine": (8.0, 0.0)}


@dataclass(frozen=True)
class Consistency:
    """A consistency loss (:mod:`cocoop_fast.ops.consistency`).

    Args:
        distance: of text features: "l1" as PromptSRC, "cosine" as KgCoOp.
        text_weight, logit_weight: of the two terms.
        templates: the hand-written prompts, each with one ``{}`` for the class name.
    """

    distance: Distance
    text_weight: float
    logit_weight: float
    templates: tuple[str, ...]

    def anchor(self, classnames: Sequence[str], clip_model: ClipModel) -> Anchor:
        """The normalised mean of the unit text features of all templates, (K, E), for K class names.

        Raises:
            UserError: no template, one without exactly one ``{}``, or an unusable class list.
        """
        mean = mean_text_features(self.templates, classnames, TextEncoder(clip_model))
        return Anchor(
            mean / mean.norm(dim=-1, keepdim=True), self.distance, self.text_weight, self.logit_weight
        )
