"""A tiny architecture known to open_clip, and whether a loaded CLIP is the model that its weights were taken from."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from comparison import assert_close
from tiny_models import IMAGE_SIZE

from cocoop_fast.clip.load import load_clip
from cocoop_fast.config import ModelConfig
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.reference import encode_prompts

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 3}
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": IMAGE_SIZE}
CONFIG = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}
NAME = "tiny-source"
UNKNOWN_ACTIVATION = "Nothing says which activation"

ignore_assumptions = pytest.mark.filterwarnings(f"ignore:{UNKNOWN_ACTIVATION}")


def add_architectures(folder):
    """A tiny architecture with GELU, and one of its name with QuickGELU, known to open_clip."""
    for name, config in ((NAME, CONFIG), (f"{NAME}-quickgelu", {**CONFIG, "quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


def load(name=NAME, pretrained=None):
    return load_clip(
        ModelConfig(name=str(name), pretrained=pretrained and str(pretrained), device="cpu", precision="fp32")
    )


def assert_same_features(loaded, model):
    """Of images and of prompts, as the model that the weights were taken from computes them."""
    image = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert_close(loaded.visual(image), model.visual(image), 1e-5, "image features")
    tokens = tokenize_prompts(["cat", "tabby cat"], n_ctx=2).tokens
    expected = encode_prompts(model, model.token_embedding(tokens), tokens)
    tokens = tokenize_prompts(
        ["cat", "tabby cat"], n_ctx=2, context_length=loaded.positional_embedding.shape[0]
    ).tokens
    assert_close(
        encode_prompts(loaded, loaded.token_embedding(tokens), tokens), expected, 1e-5, "text features"
    )
