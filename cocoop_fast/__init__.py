"""CoCoOp prompt learning for CLIP, computed once per distinct row."""

from cocoop_fast.class_tree import ClassTree
from cocoop_fast.errors import UserError
from cocoop_fast.model import CustomCLIP
from cocoop_fast.prompt_learner import PromptLearner
from cocoop_fast.text_tower import TextEncoder, TreeTextEncoder

__all__ = ["ClassTree", "CustomCLIP", "PromptLearner", "TextEncoder", "TreeTextEncoder", "UserError"]
