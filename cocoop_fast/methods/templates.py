"""Lists of zero-shot prompt templates, from ``assets/prompt_templates.yaml``."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

import yaml

from cocoop_fast.config import Ensemble


@lru_cache(maxsize=1)
def _lists() -> dict[str, list[str]]:
    text = files("cocoop_fast").joinpath("assets/prompt_templates.yaml").read_text(encoding="utf-8")
    lists: dict[str, list[str]] = yaml.safe_load(text)
    return lists


def ensemble_templates(ensemble: Ensemble, template: str) -> tuple[str, ...]:
    """The prompts of an ensemble.

    Args:
        ensemble: "none", "select" (the reference's seven) or "imagenet" (OpenAI's 80).
        template: the data set's own, which is one more; or "", as the reference has it on ImageNet.
    """
    own = (template,) if template else ()
    return own if ensemble == "none" else (*_lists()[ensemble], *own)
