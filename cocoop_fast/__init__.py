"""CoCoOp prompt learning for CLIP, computed once per distinct row.

What users import. The names are loaded on first use, so that the command line can answer `--help` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cocoop_fast.errors import UserError
    from cocoop_fast.model import CustomCLIP
    from cocoop_fast.prompt_learner import PromptLearner
    from cocoop_fast.prompts.tree import ClassTree
    from cocoop_fast.text_tower import TextEncoder, TreeTextEncoder

_HOME = {
    "ClassTree": "prompts.tree",
    "CustomCLIP": "model",
    "PromptLearner": "prompt_learner",
    "TextEncoder": "text_tower",
    "TreeTextEncoder": "text_tower",
    "UserError": "errors",
}
__all__ = ["ClassTree", "CustomCLIP", "PromptLearner", "TextEncoder", "TreeTextEncoder", "UserError"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cocoop_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cocoop_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
