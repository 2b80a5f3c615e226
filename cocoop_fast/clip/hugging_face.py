"""CLIP as Hugging Face's transformers keep it: ``CLIPModel`` to the names, sizes and preprocessing of open_clip.

Source: ``modeling_clip.py``, ``configuration_clip.py`` and ``image_processing_clip.py`` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.clip.checkpoints import WeightsError
from cocoop_fast.errors import UserError

TEXT_POSITIONS = "text_model.embeddings.position_embedding.weight"
_PARTS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    TEXT_POSITIONS: "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # spelt so
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # linear layers there, (d, E) matrices here
_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}
_IN_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
# The defaults of configuration_clip.py: a configuration file may leave out what equals them.
_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of a ``CLIPModel``."""
    return "text_model.embeddings.token_embedding.weight" in state


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``CLIPModel`` under open_clip's names.

    Raises:
        WeightsError: it has a weight that a CLIP does not have, or a layer of attention lacks one.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        block = _BLOCK.fullmatch(key)
        if key in _PARTS:
            name = _PARTS[key]
            converted[name] = value.T.contiguous() if name in _TRANSPOSED else value
        elif block is not None and (
            block[3] in _IN_BLOCK or re.fullmatch(r"self_attn\.[qkv]_proj", block[3])
        ):
            prefix = f"{_TOWERS[block[1]]}.resblocks.{block[2]}"
            if block[3] in _IN_BLOCK:
                converted[f"{prefix}.{_IN_BLOCK[block[3]]}.{block[4]}"] = value
            elif block[3] == "self_attn.q_proj":
                converted[f"{prefix}.attn.in_proj_{block[4]}"] = _joined(state, key)
        elif not key.endswith(
            ("position_ids", "logit_bias")
        ):  # the numbers 0, 1, ..; a constant of all logits
            raise WeightsError(
                f"they have names of Hugging Face's transformers, but `{key}` is not CLIPModel's"
            )
    return converted


def _joined(state: Mapping[str, Tensor], query: str) -> Tensor:
    """Query, key and value of one layer, stacked as ``nn.MultiheadAttention`` has them."""
    names = [query.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
    missing = next((name for name in names if name not in state), None)
    if missing is not None:
        raise WeightsError(f"`{missing}` is missing; the file is not complete")
    return torch.cat([state[name] for name in names])


def convert_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's configuration of a ``CLIPModel``.

    Args:
        config: the content of ``config.json``.
        where: the model, for the message.

    Raises:
        UserError: it is another kind of model, or asks for what open_clip's CLIP does not compute.
    """
    kind = config.get("model_type")
    if kind != "clip":
        raise UserError(
            f"{where} is a '{kind}' model of Hugging Face's transformers; of these only CLIPModel ('clip') is read."
        )
    text, vision = (
        {**defaults, **(config.get(f"{tower}_config") or {}), **(config.get(f"{tower}_config_dict") or {})}
        for tower, defaults in (("text", _TEXT), ("vision", _VISION))
    )
    activation = text["hidden_act"]
    if vision["hidden_act"] != activation or activation not in _ACTIVATIONS:
        raise UserError(
            f"{where} has the activations '{activation}' (text) and '{vision['hidden_act']}' (images); CLIP is "
            "computed with 'quick_gelu' or 'gelu', the same one in both."
        )
    if {text["layer_norm_eps"], vision["layer_norm_eps"]} != {1e-5}:
        raise UserError(f"{where} has a layer_norm_eps other than CLIP's 1e-05, which is not supported.")
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[activation],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_tower(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_tower(text),
        },
    }


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    width = config["hidden_size"]
    return {
        "width": width,
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / width,
    }


def convert_preprocessing(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's preprocessing of a ``CLIPImageProcessor``.

    Args:
        config: the content of ``preprocessor_config.json``.
        where: the model, for the message.

    Raises:
        UserError: it asks for steps that are not offered.
    """
    size = config.get("size", {"shortest_edge": 224})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = config.get("crop_size", 224)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    crops = config.get("do_center_crop", True)
    interpolation = _INTERPOLATIONS.get(config.get("resample", 3))
    if "shortest_edge" in size and crops and set(crop.values()) == {size["shortest_edge"]}:
        resize_mode = "shortest"
    elif "height" in size and size["height"] == size["width"] and (not crops or crop == size):
        resize_mode = "squash"
    else:
        resize_mode = None
    steps = [config.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")]
    scale = config.get("rescale_factor", 1 / 255)
    if interpolation is None or resize_mode is None or not all(steps) or abs(scale * 255 - 1) > 1e-3:
        raise UserError(
            f"The preprocessing of {where} is not supported (size {size}, crop_size {crop}, resample "
            f"{config.get('resample', 3)}): images are resized, bicubic or bilinear, to the size of the crop."
        )
    return {
        "mean": config.get("image_mean"),
        "std": config.get("image_std"),
        "interpolation": interpolation,
        "resize_mode": resize_mode,
    }
