"""A CLIP architecture by name, built without its weights: what a plan has to know of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cocoop_fast.clip.checkpoints import WeightsError
from cocoop_fast.clip.demo import DEMO_CLIPS, load_demo_clip
from cocoop_fast.clip.frozen import FrozenCLIP, text_module
from cocoop_fast.clip.load import check_architecture
from cocoop_fast.clip.weights import architecture, build
from cocoop_fast.errors import UserError
from cocoop_fast.measure.predict import Model

META = torch.device("meta")


def describe_model(name: str, dtype: torch.dtype) -> Model:
    """The shapes of an open_clip architecture, or of a demo CLIP, whose text tower computes in `dtype`.

    Raises:
        UserError: an unknown architecture, a configuration that cannot be had, or a text tower that the engine does not
            serve.
    """
    clip_model = load_demo_clip(name) if name in DEMO_CLIPS else _without_weights(name)
    frozen = FrozenCLIP(clip_model)
    visual = clip_model.visual
    return Model(
        name=name,
        weights=frozen.text_weights().to(META, dtype),
        parameters=sum(parameter.numel() for parameter in clip_model.parameters()),
        image_flops=_image_flops(visual.to(META), frozen.image_size),
        image_launches=sum(1 for module in visual.modules() if not list(module.children())),
    )


def _without_weights(name: str) -> Any:
    check_architecture(name)
    try:
        config = architecture(name)
    except WeightsError as error:
        raise UserError(f"The model '{name}' cannot be described: {error}.", exit_status=1) from error
    with META:
        model: Any = build(config, name)
    text = text_module(model)
    # FrozenCLIP reads the mask. open_clip builds no other than the causal one, or none.
    if getattr(text, "attn_mask", None) is not None:
        text.attn_mask = torch.full(text.attn_mask.shape, float("-inf")).triu(1)
    return model.eval()


def _image_flops(visual: nn.Module, size: int) -> float:
    """Products and convolutions of one image; a multiply-add is two."""
    visual.requires_grad_(False)  # else the counter looks for gradients that torch.no_grad does not make
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        visual(torch.empty(1, 3, size, size, device=META))
    return float(counter.get_total_flops())
