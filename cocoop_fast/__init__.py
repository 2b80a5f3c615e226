"""CoCoOp prompt learning for CLIP, computed once per distinct row.

What users import. The names are loaded on first use, so that the command line can answer `--help` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cocoop_fast.engine.encoder import TreeTextEncoder
    from cocoop_fast.errors import UserError
    from cocoop_fast.methods.cocoop import CustomCLIP, PromptLearner, TextEncoder
    from cocoop_fast.prompts.tree import ClassTree

_HOME = {
    "ClassTree": "prompts.tree",
    "CustomCLIP": "methods.cocoop",
    "PromptLearner": "methods.cocoop",
    "TextEncoder": "methods.cocoop",
    "TreeTextEncoder": "engine.encoder",
    "UserError": "errors",
}
__all__ = ["ClassTree", "CustomCLIP", "PromptLearner", "TextEncoder", "TreeTextEncoder", "UserError"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cocoop_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cocoop_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
