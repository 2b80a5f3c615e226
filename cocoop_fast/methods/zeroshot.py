"""Zero-shot CLIP: a hand-written prompt template, nothing learned (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cocoop_fast.clip import ClipModel, FrozenCLIP
from cocoop_fast.errors import UserError
from cocoop_fast.model import PromptedCLIP
from cocoop_fast.prompt_tokens import tokenize_names
from cocoop_fast.text_tower import TextEncoder

PROMPTS_PER_PASS = 256


class ZeroShot(PromptedCLIP):
    """Text features of "a photo of a <name>." and the like, encoded once.

    Args:
        template: the prompt, with one ``{}`` for the class name.
        classnames: K class names.
        clip_model: an open_clip or OpenAI CLIP.

    Raises:
        UserError: a template without exactly one ``{}``, or an unusable class list.
    """

    def __init__(self, template: str, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__(clip_model, len(classnames))
        if template.count("{}") != 1:
            raise UserError(f"The template '{template}' must contain {{}} once, where the class name goes.")
        self.prompt_learner = nn.Module()  # nothing is learned; its mode is that of the model
        frozen = FrozenCLIP(clip_model)
        before, after = template.split("{}")
        tokens = tokenize_names(classnames, before=before, after=after, context_length=frozen.context_length)
        self._text_features = _encode(TextEncoder(clip_model), frozen, tokens)

    def text_features(self, image_features: Tensor) -> Tensor:
        return self._text_features


@torch.no_grad()
def _encode(encoder: TextEncoder, frozen: FrozenCLIP, tokens: Tensor) -> Tensor:
    """(K, L) token ids to (1, K, E) text features."""
    embed = frozen.text_weights().token_embedding
    passes = tokens.to(embed.device).split(PROMPTS_PER_PASS)
    return torch.cat([encoder(embed[part].to(frozen.dtype), part) for part in passes])[None]
