"""From a name to a frozen CLIP model with its image preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import open_clip
import torch
from open_clip.model import convert_weights_to_lp
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import nn

from cocoop_fast.clip.checkpoints import SUFFIXES, WeightsError
from cocoop_fast.clip.demo import DEMO_CLIPS, known_token_ids, load_demo_clip
from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.clip.weights import HUB, create_clip, is_place
from cocoop_fast.config import ModelConfig, Precision
from cocoop_fast.errors import UserError
from cocoop_fast.spelling import meant, near

# open_clip's names. "shortest": the shorter edge to the model's size, then the middle; "squash": both edges to that size.
ResizeMode: TypeAlias = Literal["shortest", "squash"]
Interpolation: TypeAlias = Literal["bicubic", "bilinear"]

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
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    assumed: str = (
        ""  # of the activation, a sentence, if nothing says which one the weights were trained with
    )
    known_tokens: frozenset[int] | None = None  # all that were trained on; None: the whole vocabulary

    @property
    def text_dtype(self) -> torch.dtype | None:
        """What the text tower computes in, if not in the weights' own dtype: see :func:`amp_text_dtype`."""
        return amp_text_dtype(self.precision, self.device)


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


def amp_text_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """float16 for "amp" on a GPU, as under autocast, which ends at the engine's door; else None. On a CPU the engine is at
    its fastest in float32."""
    return torch.float16 if precision == "amp" and device.type == "cuda" else None


def describe(config: ModelConfig) -> str:
    """In a line: which CLIP a configuration names, and whose weights. Nothing is loaded."""
    if config.name in DEMO_CLIPS:
        return f"Model: {config.name}, an embedded CLIP, which knows {DEMO_CLIPS[config.name].knows} alone"
    if config.pretrained is None:
        return f"Model: {config.name}, with its own weights"
    return f"Model: {config.name}, weights {config.pretrained}"


def load_clip(config: ModelConfig) -> LoadedClip:
    """Load the CLIP that a configuration names, frozen, on its device and in its precision.

    ``name`` may be that of a CLIP inside the package (:data:`cocoop_fast.clip.demo.DEMO_CLIPS`). Any other name is an open_clip architecture, and
    ``pretrained`` what :func:`cocoop_fast.clip.weights.create_clip` reads ("random" asks for random weights,
    which only benchmarks want); or ``name`` is a hub name or folder that holds both.

    Raises:
        UserError: unknown architecture or tag, no weights named, weights that cannot be read, or a text tower
            that is not causal, EOT-pooled and over CLIP's own vocabulary.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    if config.name in DEMO_CLIPS:
        if config.pretrained is not None:
            raise UserError(
                f"The model '{config.name}' has its own weights; leave --pretrained out or name an architecture."
            )
        model: nn.Module = load_demo_clip(config.name)
        assumed = ""
    else:
        model, assumed = _load_open_clip(config.name, config.pretrained)
    if precision in _LOW_PRECISION:
        to_low_precision(model, _LOW_PRECISION[precision])
    model = model.to(device).eval().requires_grad_(False)
    loaded = clip_in_memory(model, name=config.name, precision=precision)
    return replace(
        loaded,
        assumed=assumed,
        known_tokens=known_token_ids(config.name) if config.name in DEMO_CLIPS else None,
    )


def clip_in_memory(model: Any, *, name: str = "", precision: str | None = None) -> LoadedClip:
    """A CLIP that is there already, with the image preprocessing that it names, or else OpenAI's.

    Args:
        model: an open_clip or OpenAI CLIP, on its device and in its precision. It is left as it is.
        name: for messages; "" where it has none.
        precision: ``None``: what its weights have, where float64 counts as fp32.

    Raises:
        UserError: it is no such CLIP, or wants another preprocessing than there is.
    """
    frozen, what = FrozenCLIP(model), name or type(model).__name__
    low = {dtype: text for text, dtype in _LOW_PRECISION.items()}
    preprocess = getattr(model.visual, "preprocess_cfg", {})
    return LoadedClip(
        model=model,
        name=name,
        image_size=frozen.image_size,
        mean=tuple(getattr(model.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(getattr(model.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD),
        device=model.logit_scale.device,
        precision=precision or low.get(frozen.dtype, "fp32"),
        resize_mode=_one_of(preprocess, "resize_mode", get_args(ResizeMode), what),
        interpolation=_one_of(preprocess, "interpolation", get_args(Interpolation), what),
    )


def _one_of(preprocess: Mapping[str, Any], key: str, known: tuple[Any, ...], name: str) -> Any:
    value = preprocess.get(key, known[0])
    if value not in known:
        raise UserError(
            f"The model '{name}' wants images with {key} '{value}'; of these only {' and '.join(known)} are offered."
        )
    return value


def _load_open_clip(name: str, pretrained: str | None) -> tuple[nn.Module, str]:
    check_architecture(name)
    _check_weights(name, pretrained)
    what = f"The weights '{pretrained}' of model '{name}'" if pretrained else f"The model '{name}'"
    try:
        return create_clip(name, pretrained)
    except UserError:
        raise
    except WeightsError as error:
        raise UserError(f"{what} could not be loaded: {error}.", exit_status=1) from error
    except (
        Exception
    ) as error:  # whatever the failure (network, permissions, memory), the weights cannot be had
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what} could not be loaded ({reason[:200]}); "
            "check the file, or download it beforehand and pass its path.",
            exit_status=1,
        ) from error


def check_architecture(name: str) -> None:
    """Raises a UserError with the nearest names if open_clip does not know this architecture."""
    if is_place(name) or name in open_clip.list_models():
        return
    known = [*DEMO_CLIPS, *open_clip.list_models()]
    alike, same = near(name, known, 3), meant(name, known)
    hint = (
        f"did you mean {' or '.join(alike)}?" if alike else "open_clip.list_models() names those there are."
    )
    if same is not None:
        hint = f"did you mean {same}?"
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        hint = f"did you mean {' or '.join([*alike, f'{HUB}{name} (a repository of the Hugging Face hub)'])}?"
    elif "/" in name:
        hint = "and there is no folder of this name; is it misspelt?"
    raise UserError(f"The model '{name}' is not an open_clip architecture; {hint}")


def _check_weights(name: str, pretrained: str | None) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if is_place(name):
        if pretrained is not None:
            raise UserError(f"The model '{name}' comes with its weights; leave --pretrained out.")
    elif pretrained is None:
        known = f" (known tags: {', '.join(tags[:5])})" if tags else ""
        raise UserError(f"The model '{name}' needs weights: give --pretrained a tag{known} or a file.")
    elif pretrained == "random" or pretrained.startswith(HUB) or pretrained in tags:
        return
    elif "/" in pretrained or Path(pretrained).suffix in SUFFIXES or Path(pretrained).exists():
        if not Path(pretrained).exists():
            raise UserError(f"The weights file {pretrained} does not exist; check --pretrained.")
    else:
        raise UserError(_unknown_tag(name, pretrained, tags))


def _unknown_tag(name: str, pretrained: str, tags: list[str]) -> str:
    plain = name.removesuffix("-quickgelu")
    alike = near(pretrained, tags)
    remedy = f"did you mean {alike[0]}? The" if alike else "the"
    remedy += f" tags are: {', '.join(tags) or 'none'}"
    if plain != name and pretrained in open_clip.list_pretrained_tags_by_model(plain):
        remedy = f"'{plain}' has: use --model {plain}"
    return f"The model '{name}' has no weights tagged '{pretrained}'; {remedy}."


def to_low_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """OpenAI's manual mixed precision: matrix weights in `dtype`, LayerNorms computed in float32."""
    convert_weights_to_lp(model, dtype=dtype)
    for module in model.modules():
        if type(module) is LayerNorm:
            module.__class__ = LayerNormFp32
