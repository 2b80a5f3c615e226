"""Zero-shot CLIP: hand-written prompt templates, nothing learned (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel, FrozenCLIP
from cocoop_fast.errors import UserError
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.cocoop import TextEncoder
from cocoop_fast.prompts.tokens import tokenize_names

PROMPTS_PER_PASS = 256


class ZeroShot(PromptedCLIP):
    """Text features of "a photo of a <name>." and the like, encoded once.

    With several templates a class's text feature is the mean of those of its prompts, each of unit length.

    Args:
        templates: the prompt, or prompts, each with one ``{}`` for the class name.
        classnames: K class names.
        clip_model: an open_clip or OpenAI CLIP.

    Raises:
        UserError: no template, one without exactly one ``{}``, or an unusable class list.
    """

    def __init__(
        self, templates: str | Sequence[str], classnames: Sequence[str], clip_model: ClipModel
    ) -> None:
        super().__init__(clip_model, len(classnames))
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        if not self.templates:
            raise UserError("Zero-shot CLIP needs at least one template, such as 'a photo of a {}.'.")
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(
                    f"The template '{template}' must contain {{}} once, where the class name goes."
                )
        self.prompt_learner = nn.Module()  # nothing is learned; its mode is that of the model
        self._frozen = FrozenCLIP(clip_model)
        self.text_encoder = TextEncoder(clip_model)
        self.set_classnames(classnames)

    def text_features(self, image_features: Tensor) -> Tensor:
        return self._text_features

    @torch.no_grad()
    def set_classnames(self, classnames: Sequence[str]) -> None:
        total: Tensor | float = 0.0
        for template in self.templates:
            features = self._encode(template, classnames)
            total = total + features / features.norm(dim=-1, keepdim=True)
        assert isinstance(total, Tensor)
        self._text_features = (total / len(self.templates))[None]  # (1, K, E), normalised with the logits
        self.n_classes = len(classnames)

    def _encode(self, template: str, classnames: Sequence[str]) -> Tensor:
        """(K, E) text features of one template."""
        before, after = template.split("{}")
        length = self._frozen.context_length
        tokens = tokenize_names(classnames, before=before, after=after, context_length=length)
        embed = self._frozen.text_weights().token_embedding
        passes = tokens.to(embed.device).split(PROMPTS_PER_PASS)
        return torch.cat([self.text_encoder(embed[part].to(self._frozen.dtype), part) for part in passes])
