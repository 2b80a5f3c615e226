"""The methods that can be named: all that the rest of the package knows of each is its record.

A new method is a file here, a record below, its name in :data:`cocoop_fast.config.Method`, and a line in
``docs/methods.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from typing_extensions import Unpack

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.clip.tokenizer import encode
from cocoop_fast.config import PromptConfig
from cocoop_fast.methods.base import EngineOptions, LearnedPromptCLIP, PromptedCLIP
from cocoop_fast.methods.cocoop import CustomCLIP, TextEncoder, reference_cfg
from cocoop_fast.methods.consistency import Consistency
from cocoop_fast.methods.coop import CoOp
from cocoop_fast.methods.linear_probe import LinearProbe
from cocoop_fast.methods.meta_nets import MetaNetsCLIP
from cocoop_fast.methods.zeroshot import ZeroShot, ensemble_templates, mean_text_features
from cocoop_fast.prompts.tokens import warn_of_unknown_words
from cocoop_fast.variants import plain, title_of


@dataclass(frozen=True)
class MethodRecord:
    """A method.

    Args:
        title: its name as people read it, within a sentence.
        build: the model of a configuration over class names, ready to train.
        colour: of its plots: a name in the palette of :mod:`cocoop_fast.report.style`.
        batch_size: of its published recipe.
        epochs: of its published recipe; None: by the number of shots, as CoOp; 0: it has no steps.
        learns: whether anything of it depends on the training images.
        knows_other_classes: whether what it learns on some classes can be used on others, by its options.
    """

    title: str
    build: Callable[[PromptConfig, Sequence[str], LoadedClip, EngineOptions], PromptedCLIP]
    colour: str
    batch_size: int = 1
    epochs: int | None = 0
    learns: bool = True
    knows_other_classes: Callable[[PromptConfig], bool] = lambda prompt: not prompt.csc


def _context_model(
    model: type[CoOp],
    prompt: PromptConfig,
    classnames: Sequence[str],
    clip: LoadedClip,
    engine: EngineOptions,
) -> PromptedCLIP:
    cfg = reference_cfg(
        ctx_init=prompt.ctx_init,
        n_ctx=prompt.n_ctx,
        precision=clip.precision,
        image_size=clip.image_size,
        csc=prompt.csc,
        class_position=prompt.class_position,
        attributes=prompt.attributes,
        ablate_image=prompt.ablate_image,
    )
    return model(cfg, classnames, clip.model, **engine)


def _zero_shot(
    prompt: PromptConfig, classnames: Sequence[str], clip: LoadedClip, _: EngineOptions
) -> PromptedCLIP:
    return ZeroShot(zero_shot_templates(prompt), classnames, clip.model)


def zero_shot_templates(prompt: PromptConfig) -> tuple[str, ...]:
    """The prompts of zero-shot CLIP."""
    template = "a photo of a {}." if prompt.template is None else prompt.template
    return ensemble_templates(prompt.ensemble, template)


METHODS: dict[str, MethodRecord] = {
    "zeroshot": MethodRecord(
        "zero-shot CLIP", _zero_shot, "grey", learns=False, knows_other_classes=lambda _: True
    ),
    "coop": MethodRecord("CoOp", partial(_context_model, CoOp), "blue", batch_size=32, epochs=None),
    "cocoop": MethodRecord("CoCoOp", partial(_context_model, CustomCLIP), "orange", epochs=10),
    "meta-nets": MethodRecord("M Meta-Nets", partial(_context_model, MetaNetsCLIP), "green", epochs=10),
    "linear-probe": MethodRecord(
        "linear probe",
        lambda _prompt, classnames, clip, _engine: LinearProbe(classnames, clip.model),
        "pink",
        knows_other_classes=lambda _: False,
    ),
}  # in the order of the paper's tables


def build_model(
    prompt: PromptConfig,
    classnames: Sequence[str],
    clip: LoadedClip,
    consistency: Consistency | None = None,
    **engine: Unpack[EngineOptions],
) -> PromptedCLIP:
    """The model of a method over K class names, ready to train.

    Args:
        prompt: the method and its options.
        classnames: K names.
        clip: the frozen model.
        consistency: keeps learned prompts near hand-written ones in training; means nothing to other methods.
        engine: options of :class:`LearnedPromptCLIP`; what learns no prompt needs none. `text_dtype` is the CLIP's if it is
            not given.

    Raises:
        UserError: an unusable class list, context, template, backend or budget.
    """
    engine.setdefault("text_dtype", clip.text_dtype)
    model = METHODS[prompt.method].build(prompt, classnames, clip, engine)
    if consistency is not None and isinstance(model, LearnedPromptCLIP):
        model.keep_near(partial(consistency.anchor, clip_model=clip.model), classnames)
    if prompt.average_zero_shot and isinstance(model, LearnedPromptCLIP):
        templates, text_encoder = zero_shot_templates(prompt), TextEncoder(clip.model)
        model.average_with(partial(mean_text_features, templates, text_encoder=text_encoder), classnames)
    if clip.known_tokens is not None:
        warn_of_unknown_words(classnames, clip.known_tokens)
        unknown = [word for word in prompt.attributes if not clip.known_tokens.issuperset(encode(word))]
        if unknown:
            warnings.warn(
                f"The model never saw the attribute {', '.join(unknown)}: it is no anchor, but a vector like any other.",
                stacklevel=2,
            )
    return model


def knows_other_classes(prompt: PromptConfig) -> bool:
    """Whether what the method learns on some classes can be used on others."""
    return METHODS[prompt.method].knows_other_classes(prompt)


def has_context(method: str) -> bool:
    """Whether the method learns a context, by steps of training."""
    return METHODS[method].epochs != 0


def record_of(variant: str) -> MethodRecord | None:
    """Of the method of a variant; ``None``: there is none of that name."""
    return METHODS.get(plain(variant))


def method_title(variant: str) -> str:
    """A variant's name as people read it; any other text as it is."""
    record = record_of(variant)
    return record.title + title_of(variant) if record else variant
