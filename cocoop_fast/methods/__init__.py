"""What is learned: the frozen CLIP with prompts (``base``), what a learner is (``learner``), and one file a method.

May import ``engine`` and below. Imported by training, evaluation and everything above. ``records`` lists the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from typing_extensions import Unpack

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.config import PromptConfig
from cocoop_fast.methods.base import EngineOptions, LearnedPromptCLIP, PromptedCLIP
from cocoop_fast.methods.cocoop import CustomCLIP, reference_cfg
from cocoop_fast.methods.coop import CoOp
from cocoop_fast.methods.linear_probe import LinearProbe
from cocoop_fast.methods.meta_nets import MetaNetsCLIP
from cocoop_fast.methods.templates import ensemble_templates
from cocoop_fast.methods.zeroshot import ZeroShot
from cocoop_fast.prompts.tokens import warn_of_unknown_words

LEARNED: dict[str, Callable[..., LearnedPromptCLIP]] = {
    "cocoop": CustomCLIP,
    "coop": CoOp,
    "meta-nets": MetaNetsCLIP,
}


def build_model(
    prompt: PromptConfig, classnames: Sequence[str], clip: LoadedClip, **engine: Unpack[EngineOptions]
) -> PromptedCLIP:
    """The model of a method over K class names, ready to train.

    Args:
        prompt: the method and its options.
        classnames: K names.
        clip: the frozen model.
        engine: backend, memory_budget and prune_mass of :class:`LearnedPromptCLIP`; what learns no prompt needs none.

    Raises:
        UserError: an unusable class list, context, template, backend or budget.
    """
    model = _build(prompt, classnames, clip, engine)
    if clip.known_tokens is not None:
        warn_of_unknown_words(classnames, clip.known_tokens)
    return model


def _build(
    prompt: PromptConfig, classnames: Sequence[str], clip: LoadedClip, engine: EngineOptions
) -> PromptedCLIP:
    if prompt.method == "zeroshot":
        template = "a photo of a {}." if prompt.template is None else prompt.template
        return ZeroShot(ensemble_templates(prompt.ensemble, template), classnames, clip.model)
    if prompt.method == "linear-probe":
        return LinearProbe(classnames, clip.model)
    cfg = reference_cfg(
        ctx_init=prompt.ctx_init,
        n_ctx=prompt.n_ctx,
        precision=clip.precision,
        image_size=clip.image_size,
        csc=prompt.csc,
        class_position=prompt.class_position,
    )
    return LEARNED[prompt.method](cfg, classnames, clip.model, **engine)


def knows_other_classes(prompt: PromptConfig) -> bool:
    """Whether what the method learns on some classes can be used on others."""
    return prompt.method == "zeroshot" or (prompt.method != "linear-probe" and not prompt.csc)


__all__ = ["CoOp", "LinearProbe", "MetaNetsCLIP", "ZeroShot", "build_model", "knows_other_classes"]
