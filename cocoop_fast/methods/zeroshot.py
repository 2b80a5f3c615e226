"""Zero-shot CLIP: hand-written prompt templates, nothing learned (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from importlib.resources import files

import torch
import yaml
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.config import Ensemble
from cocoop_fast.errors import UserError
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.cocoop import TextEncoder
from cocoop_fast.prompts.tokens import tokenize_names

PROMPTS_PER_PASS = 256


def ensemble_templates(ensemble: Ensemble, template: str) -> tuple[str, ...]:
    """The prompts of an ensemble, from ``assets/prompt_templates.yaml``.

    Args:
        ensemble: "none", "select" (the reference's seven) or "imagenet" (OpenAI's 80).
        template: the data set's own, which is one more; or "", as the reference has it on ImageNet.
    """
    own = (template,) if template else ()
    if ensemble == "none":
        return own
    lists = files("cocoop_fast").joinpath("assets/prompt_templates.yaml").read_text(encoding="utf-8")
    return (*yaml.safe_load(lists)[ensemble], *own)


@torch.no_grad()
def mean_text_features(
    templates: Sequence[str], classnames: Sequence[str], text_encoder: TextEncoder
) -> Tensor:
    """(K, E) of each class the mean, over all templates, of the unit text features of its prompt.

    Args:
        templates: each with one ``{}`` for the class name.
        classnames: K names.
        text_encoder: of the CLIP.

    Raises:
        UserError: no template, one without exactly one ``{}``, or an unusable class list.
    """
    if not templates:
        raise UserError("Zero-shot CLIP needs at least one template, such as 'a photo of a {}.'.")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"The template '{template}' must contain {{}} once, where the class name goes.")
    total = reduce(torch.add, (_encode(template, classnames, text_encoder) for template in templates))
    return total / len(templates)


def _encode(template: str, classnames: Sequence[str], text_encoder: TextEncoder) -> Tensor:
    """(K, E) unit-length text features of one template."""
    before, after = template.split("{}")
    frozen = text_encoder.frozen
    tokens = tokenize_names(classnames, before=before, after=after, context_length=frozen.context_length)
    embed = frozen.text_weights().token_embedding
    passes = tokens.to(embed.device).split(PROMPTS_PER_PASS)
    features = torch.cat([text_encoder(embed[part].to(frozen.dtype), part) for part in passes])
    return features / features.norm(dim=-1, keepdim=True)


class ZeroShot(PromptedCLIP):
    """Text features of "a photo of a <name>." and the like, encoded once.

    With several templates a class's text feature is the mean of those of its prompts, each of unit length:
    ``mean_features`` (K, E).

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
        self.prompt_learner = nn.Module()  # nothing is learned; its mode is that of the model
        self.text_encoder = TextEncoder(clip_model)
        self.register_buffer("mean_features", None, persistent=False)
        self.set_classnames(classnames)

    def text_features(self, image_features: Tensor) -> Tensor:
        return self.mean_features[None].to(image_features.dtype)  # normalised with the logits

    def set_classnames(self, classnames: Sequence[str]) -> None:
        self.mean_features = mean_text_features(self.templates, classnames, self.text_encoder)
        self.n_classes = len(classnames)
