"""CoCoOp prompt learning for CLIP, computed once per distinct row.

What users import. The names are loaded on first use, so that the command line can answer `--help` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cocoop_fast.clip.demo import load_demo_clip
    from cocoop_fast.clip.load import load_clip
    from cocoop_fast.config import ModelConfig
    from cocoop_fast.engine.encoder import TreeTextEncoder
    from cocoop_fast.errors import UserError
    from cocoop_fast.experiments.predict import Predictor
    from cocoop_fast.integrations.scikit_learn import PromptClassifier
    from cocoop_fast.methods.cocoop import CustomCLIP, PromptLearner, TextEncoder, reference_cfg
    from cocoop_fast.methods.coop import CoOp
    from cocoop_fast.methods.learner import Learner
    from cocoop_fast.methods.zeroshot import ZeroShot
    from cocoop_fast.prompts.tree import ClassTree
    from cocoop_fast.runs.sharing import load_pretrained, save_pretrained

    __version__: str

_HOME = {
    "ClassTree": "prompts.tree",
    "CoOp": "methods.coop",
    "CustomCLIP": "methods.cocoop",
    "Learner": "methods.learner",
    "ModelConfig": "config",
    "Predictor": "experiments.predict",
    "PromptClassifier": "integrations.scikit_learn",
    "PromptLearner": "methods.cocoop",
    "TextEncoder": "methods.cocoop",
    "TreeTextEncoder": "engine.encoder",
    "UserError": "errors",
    "ZeroShot": "methods.zeroshot",
    "load_clip": "clip.load",
    "load_demo_clip": "clip.demo",
    "load_pretrained": "runs.sharing",
    "reference_cfg": "methods.cocoop",
    "save_pretrained": "runs.sharing",
}
# Spelled out for type checkers; tests hold it to _HOME.
__all__ = [
    "ClassTree", "CoOp", "CustomCLIP", "Learner", "ModelConfig", "Predictor", "PromptClassifier", "PromptLearner", "TextEncoder",
    "TreeTextEncoder", "UserError", "ZeroShot", "__version__", "load_clip", "load_demo_clip", "load_pretrained",
    "reference_cfg", "save_pretrained",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'cocoop_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cocoop_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Of the installed package."""
    from importlib import metadata

    try:
        return metadata.version("cocoop-fast")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "0+unknown"
