"""From a name to a frozen CLIP model with its image preprocessing."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.model import convert_weights_to_lp
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import nn

from cocoop_fast.clip.demo import known_token_ids, load_demo_clip
from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.clip.tokenizer import tokenizer
from cocoop_fast.clip.weights import FOLDER, HUB, SUFFIXES, create_clip
from cocoop_fast.config import ModelConfig, Precision
from cocoop_fast.errors import UserError

_LOW_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedClip:
    """A frozen CLIP in evaluation mode, and what an image must look like for it."""

    model: nn.Module
    name: str
    image_size: int  # pixels, square
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    precision: str  # fp32, fp16, bf16 or amp
    known_tokens: frozenset[int] | None = None  # all that were trained on; None: the whole vocabulary


def resolve_device(text: str) -> torch.device:
    """ "auto" (a GPU where there is one, else the CPU) or any torch device.

    Raises:
        UserError: the device is unknown, or is not there.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UserError(f"The device '{text}' is unknown; use auto, cpu, cuda or cuda:N.") from error
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"The device '{text}' is not there ({gpus} GPUs found); use --device cpu.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"The device '{text}' is not supported; use auto, cpu, cuda or cuda:N.")
    return device


def resolve_precision(text: Precision, device: torch.device) -> Precision:
    """ "auto" becomes fp32 on a CPU and fp16, the reference's choice, on a GPU."""
    if text == "auto":
        return "fp32" if device.type == "cpu" else "fp16"
    return text


def load_clip(config: ModelConfig) -> LoadedClip:
    """Load the CLIP that a configuration names, frozen, on its device and in its precision.

    ``name`` "demo" is the CLIP inside the package. Any other name is an open_clip architecture, and
    ``pretrained`` what :func:`cocoop_fast.clip.weights.create_clip` reads ("random" asks for random weights,
    which only benchmarks want); or ``name`` is a hub name or folder that holds both.

    Raises:
        UserError: unknown architecture or tag, no weights named, weights that cannot be read, or a text tower
            that is not causal, EOT-pooled and over CLIP's own vocabulary.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    if config.name == "demo":
        if config.pretrained is not None:
            raise UserError(
                "The model 'demo' has its own weights; leave --pretrained out or name an architecture."
            )
        model = load_demo_clip()
    else:
        model = _load_open_clip(config.name, config.pretrained)
        _check_text_tower(model, config.name)
    if precision in _LOW_PRECISION:
        to_low_precision(model, _LOW_PRECISION[precision])
    model = model.to(device).eval().requires_grad_(False)
    return LoadedClip(
        model=model,
        name=config.name,
        image_size=FrozenCLIP(model).image_size,
        mean=tuple(getattr(model.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(getattr(model.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD),
        device=device,
        precision=precision,
        known_tokens=known_token_ids() if config.name == "demo" else None,
    )


def _load_open_clip(name: str, pretrained: str | None) -> nn.Module:
    check_architecture(name)
    _check_weights(name, pretrained)
    if pretrained == "random":
        return open_clip.create_model(name, pretrained=None)
    try:
        return create_clip(name, pretrained)
    except (
        Exception
    ) as error:  # whatever the reader's failure (pickle, zip, shapes, network), the weights are bad
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"The weights '{pretrained}' of model '{name}'" if pretrained else f"The model '{name}'"
        raise UserError(
            f"{what} could not be loaded ({reason[:200]}); "
            "check the file, or download it beforehand and pass its path.",
            exit_status=1,
        ) from error


def check_architecture(name: str) -> None:
    """Raises a UserError with the nearest names if open_clip does not know this architecture."""
    if name.startswith((HUB, FOLDER)) or name in open_clip.list_models():
        return
    near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}" if near else "see open_clip.list_models()"
    raise UserError(f"The model '{name}' is not an open_clip architecture; {hint}?")


def _check_weights(name: str, pretrained: str | None) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if name.startswith((HUB, FOLDER)):
        if pretrained is not None:
            raise UserError(f"The model '{name}' comes with its weights; leave --pretrained out.")
    elif pretrained is None:
        known = f" (known tags: {', '.join(tags[:5])})" if tags else ""
        raise UserError(f"The model '{name}' needs weights: give --pretrained a tag{known} or a file.")
    elif pretrained == "random" or pretrained.startswith(HUB):
        return
    elif "/" in pretrained or Path(pretrained).suffix in SUFFIXES:
        if not Path(pretrained).is_file():
            raise UserError(f"The weights file {pretrained} does not exist; check --pretrained.")
    elif pretrained not in tags:
        raise UserError(
            f"The model '{name}' has no weights tagged '{pretrained}'; the tags are: {', '.join(tags) or 'none'}."
        )


def _check_text_tower(model: nn.Module, name: str) -> None:
    vocab_size, ours = FrozenCLIP(model).vocab_size, tokenizer().vocab_size
    if vocab_size != ours:
        raise UserError(
            f"The text tower of '{name}' knows {vocab_size} tokens, so it was not trained with CLIP's tokenizer, "
            f"which has {ours}; use a CLIP model with that tokenizer."
        )


def to_low_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """OpenAI's manual mixed precision: matrix weights in `dtype`, LayerNorms computed in float32."""
    convert_weights_to_lp(model, dtype=dtype)
    for module in model.modules():
        if type(module) is LayerNorm:
            module.__class__ = LayerNormFp32
