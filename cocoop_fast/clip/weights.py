"""A CLIP with its weights: from an open_clip tag, a file, a folder, or a repository of the Hugging Face hub.

Weights do not show which activation they were trained with, nor how images were prepared. Both are taken from what
lies beside them: the tag's record, a configuration, the sizes in OpenAI's files. Where nothing says it, a warning
tells what was assumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from cocoop_fast.clip import hugging_face
from cocoop_fast.clip.checkpoints import SUFFIXES, State, WeightsError, listed_parts, read_state
from cocoop_fast.clip.frozen import FrozenCLIP, text_module
from cocoop_fast.clip.hub import hub_file, kept_file, tagged_file
from cocoop_fast.clip.tokenizer import tokenizer
from cocoop_fast.errors import UserError
from cocoop_fast.files.parsing import json_value

HUB = "hf-hub:"
FOLDER = "local-dir:"
Config = dict[str, Any]  # an architecture or a preprocessing, in open_clip's terms

# OpenAI's files hold these numbers beside the weights. Its models have QuickGELU.
_OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}
_LONG_CLIP_KEEPS = 20
_OPEN_CLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)


@dataclass(frozen=True)
class Source:
    """Where weights come from, and what is known of them before they are read.

    Args:
        read: the state dict; downloads it if need be. ``WeightsError`` if it cannot be used.
        architecture: open_clip's configuration of the model; ``None``: not said.
        quick_gelu: which activation they were trained with; ``None``: not said.
        preprocess: what is said of the images, in open_clip's terms.
    """

    read: Callable[[], State]
    architecture: Config | None = None
    quick_gelu: bool | None = None
    preprocess: Config = field(default_factory=dict)


def create_clip(name: str, pretrained: str | None) -> tuple[nn.Module, str]:
    """Build a CLIP and load its weights, without running code that a file holds.

    Args:
        name: an open_clip architecture; or ``hf-hub:<owner>/<repository>`` or a folder, which hold architecture and
            weights (open_clip's, or a ``CLIPModel`` of Hugging Face), and take no `pretrained`.
        pretrained: an open_clip tag, a hub name, a folder, or a file: whatever
            :func:`cocoop_fast.clip.checkpoints.read_state` reads; "random": no weights.

    Returns:
        tuple[nn.Module, str]: the model, float32 on the CPU, whose `visual.preprocess_cfg` is what its images need; and a
            sentence on what was assumed of its activation, which is empty if nothing was.

    Raises:
        UserError: the text tower or the shape of images is not supported (noticed before weights are downloaded).
        WeightsError: the weights cannot be read, are not those of the architecture, or are not finite numbers.
        Exception: of any kind, if the weights cannot be had.
    """
    source = _at(name) if is_place(name) else _pretrained(name, pretrained)
    config = architecture(name) if not is_place(name) else _architecture_of(source, name)
    if source.quick_gelu is not None:
        config["quick_gelu"] = source.quick_gelu
    model = build(config, name, source.preprocess)
    check_text_tower(model, name)
    if pretrained == "random":
        return model, ""
    state = _one_position_table(source.read())
    adapted = _adapted(config, state)
    if adapted != config:
        model = build(adapted, name, source.preprocess)
    assumed = ""
    if source.quick_gelu is None and not adapted.get("quick_gelu", False):
        assumed = _assumption(name, pretrained)
        warnings.warn(assumed, stacklevel=3)
    _load(model, state)
    return model, assumed


def is_place(name: str) -> bool:
    """Whether a name is a folder or a repository of the hub, not an architecture."""
    if name.startswith((HUB, FOLDER)):
        return True
    return name not in open_clip.list_models() and Path(name).expanduser().is_dir()


def architecture(name: str) -> Config:
    """open_clip's configuration of an architecture, or of the model in a folder or repository. The caller's own copy.

    Raises:
        UserError: there is none.
    """
    if is_place(name):
        return _architecture_of(_at(name), name)
    return deepcopy(open_clip.get_model_config(name)) or {}


def _architecture_of(source: Source, name: str) -> Config:
    if source.architecture is None:
        raise UserError(
            f"'{name}' does not say which CLIP it is: it has neither open_clip's open_clip_config.json nor the "
            "config.json of a CLIPModel of Hugging Face; give --model the architecture and --pretrained the weights."
        )
    return deepcopy(source.architecture)


def build(config: Config, name: str, preprocess: Mapping[str, Any] | None = None) -> nn.Module:
    """A CLIP of open_clip with random weights. Nothing is downloaded.

    Args:
        config: open_clip's configuration.
        name: the model's, for messages.
        preprocess: what is known of it.

    Raises:
        UserError: a tower of another library, a captioning model, or images that are not square.
    """
    config = deepcopy(config)
    size = config["vision_cfg"].get("image_size", 224)
    if isinstance(size, (tuple, list)) and len(set(size)) > 1:
        raise UserError(
            f"The model '{name}' is for images of {size[0]} x {size[1]} pixels; only square images are supported."
        )
    if config["text_cfg"].get("hf_model_name"):
        raise UserError(
            f"The text tower of '{name}' is a Hugging Face model; use a CLIP model of open_clip or OpenAI."
        )
    if "multimodal_cfg" in config:
        raise UserError(
            f"'{name}' is a captioning model, not a CLIP; use a CLIP model of open_clip or OpenAI."
        )
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    model = (CustomTextCLIP if config.pop("custom_text", False) else CLIP)(**config)
    cleaned = merge_preprocess_dict(PreprocessCfg(), dict(preprocess or {}))
    set_model_preprocess_cfg(model, {**cleaned, "size": getattr(model.visual, "image_size", size)})
    return model


def check_text_tower(model: nn.Module, name: str) -> None:
    """Raises a UserError for a text tower that the engine does not serve, or of another vocabulary."""
    vocab_size, ours = FrozenCLIP(model).vocab_size, tokenizer().vocab_size
    if vocab_size != ours:
        raise UserError(
            f"The text tower of '{name}' knows {vocab_size} tokens, so it was not trained with CLIP's tokenizer, "
            f"which has {ours}; use a CLIP model with that tokenizer."
        )


def _pretrained(name: str, pretrained: str | None) -> Source:
    """Weights for an architecture."""
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if tag:
        kept_file(tag)  # an absent network is noticed before anything is built
        return Source(lambda: read_state(tagged_file(tag)), None, bool(tag.get("quick_gelu", False)), tag)
    if pretrained in (None, "random"):
        return Source(dict, preprocess=_usual_preprocess(name))
    assert pretrained is not None
    if pretrained.startswith(HUB) or Path(pretrained).is_dir():
        source = _at(pretrained)
    else:
        source = _file(Path(pretrained))
    return (
        source if source.preprocess else Source(source.read, None, source.quick_gelu, _usual_preprocess(name))
    )


def _usual_preprocess(name: str) -> Config:
    """What all published weights of an architecture agree on; nothing if they do not agree."""
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    cleaned = [merge_preprocess_dict(PreprocessCfg(), tag) for tag in tags]
    return cleaned[0] if cleaned and all(one == cleaned[0] for one in cleaned) else {}


def _file(path: Path) -> Source:
    """A file of weights. A configuration beside it holds for it if it has the name that such weights have."""

    def find(name: str) -> Path | None:
        return found if (found := path.parent / name).is_file() else None

    named = find if path.name in _OPEN_CLIP_FILES + _FILES else lambda name: None
    return _described(str(path), named, lambda: path)


def _at(place: str) -> Source:
    """The model in a folder or a repository of the hub."""
    if not place.startswith(HUB):
        folder = Path(place.removeprefix(FOLDER)).expanduser()
        if not folder.is_dir():
            raise UserError(f"The folder {folder} does not exist.")

        def in_folder(name: str) -> Path | None:
            return found if (found := folder / name).is_file() else None

        return _described(place, in_folder, lambda: _weights_in(folder))

    repository, errors = place.removeprefix(HUB), []

    def in_hub(name: str) -> Path | None:
        try:
            return hub_file(repository, name)
        except Exception as error:  # of any kind: not there, no network, no permission
            errors.append(error)
            return None

    def weights() -> Path:
        found = next(filter(None, map(in_hub, _OPEN_CLIP_FILES + _FILES)), None)
        if found is None:
            raise errors[0]
        if found.name.endswith(".index.json"):
            for part in listed_parts(found):
                hub_file(repository, part)
        return found

    source = _described(place, in_hub, weights)
    if source.architecture is None and len(errors) > 1:
        if isinstance(errors[0], WeightsError):
            raise errors[0]
        reason = " ".join(str(errors[0]).split())[:200]
        raise WeightsError(
            f"neither open_clip_config.json nor config.json of a CLIPModel can be had ({reason})"
        )
    return source


def _weights_in(folder: Path) -> Path:
    for name in _OPEN_CLIP_FILES + _FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(others) != 1:
        names = ", ".join(path.name for path in others) or "none"
        raise WeightsError(
            f"the folder has to hold one file of weights ({', '.join(SUFFIXES)}), and has {names}"
        )
    return others[0]


def _described(place: str, find: Callable[[str], Path | None], weights: Callable[[], Path]) -> Source:
    """A source and what the configurations that `find` finds beside it say."""

    def read() -> State:
        return read_state(weights())

    path = find("open_clip_config.json")
    if path is not None:
        content = _json(path)
        config = content.get("model_cfg", content)
        if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
            raise WeightsError(f"{path} has no `model_cfg` with embed_dim, vision_cfg and text_cfg")
        said = bool(config.get("quick_gelu", False))
        return Source(read, config, said, content.get("preprocess_cfg") or {})
    path = find("config.json")
    if path is None or "model_type" not in (content := _json(path)):
        return Source(read)
    config = hugging_face.convert_config(content, f"'{place}'")
    path = find("preprocessor_config.json")
    preprocess = {} if path is None else hugging_face.convert_preprocessing(_json(path), f"'{place}'")
    return Source(read, config, config["quick_gelu"], preprocess)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json_value(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a configuration")
    return content


def _adapted(config: Config, state: State) -> Config:
    """The configuration with what the weights themselves show: OpenAI's activation, the number of text positions."""
    config = deepcopy(config)
    if state.keys() >= _OPENAI_SIZES:
        config["quick_gelu"] = True
    names = ("positional_embedding", "text.positional_embedding", hugging_face.TEXT_POSITIONS)
    positions = next((state[name] for name in names if name in state), None)
    if positions is not None and len(positions) != config["text_cfg"].get("context_length", 77):
        config["text_cfg"]["context_length"] = len(positions)
    return config


def _one_position_table(state: State) -> State:
    """Long-CLIP keeps its text positions in two tables: the first 20 rows hold in one, the others in the other.

    Source: ``CLIP.encode_text`` in ``model/model_longclip.py`` of https://github.com/beichenzbc/Long-CLIP.
    """
    rest = state.get("positional_embedding_res")
    if rest is None:
        return state
    table = torch.cat([state["positional_embedding"][:_LONG_CLIP_KEEPS], rest[_LONG_CLIP_KEEPS:]])
    others = {key: value for key, value in state.items() if key != "positional_embedding_res"}
    return {**others, "positional_embedding": table}


def _assumption(name: str, pretrained: str | None) -> str:
    quick = f"{name}-quickgelu"
    remedy = (
        f"name the architecture {quick}"
        if quick in open_clip.list_models()
        else 'put them in a folder with an open_clip_config.json that says "quick_gelu": true'
    )
    return (
        f"Nothing says which activation the weights '{pretrained}' were trained with: GELU is assumed. If it was "
        f"QuickGELU, as in OpenAI's models and those trained from them, {remedy}."
    )


def _load(model: nn.Module, state: State) -> None:
    """Put weights into a model, after a look at them."""
    if hugging_face.is_hugging_face(state):
        state = hugging_face.convert_state(state)
    state = convert_state_dict(model, state)  # MobileCLIP's own names
    custom = text_module(model) is not model
    if custom and "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
    elif not custom:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    # A script holds the causal mask like a weight; every model makes its own. A bias of all logits changes nothing.
    left_out = {*_OPENAI_SIZES, "logit_bias"} - model.state_dict().keys()
    state = {k: v for k, v in state.items() if k not in left_out and k.split(".")[-1] != "attn_mask"}
    expected = model.state_dict()
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in expected and state[key].numel() == 1:
            state[key] = state[key].reshape(expected[key].shape)
    if "logit_bias" in expected:
        state.setdefault("logit_bias", torch.zeros_like(expected["logit_bias"]))
    _check_fit(expected, state)
    model.load_state_dict(state)


def _check_fit(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Raises a WeightsError that names what is missing, not the architecture's, of another shape, or no weights of a
    trained model: not finite, whole numbers, zero."""
    shapes = [
        f"`{key}` is {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    infinite = [f"`{key}`" for key, value in state.items() if not _is_finite(value)]
    numbers = {
        key: value for key, value in state.items() if key in expected and expected[key].is_floating_point()
    }
    whole = [f"`{key}`" for key, value in numbers.items() if not value.is_floating_point()]
    zero = [f"`{key}`" for key, value in numbers.items() if value.ndim > 1 and not value.any()]
    for what, names in (
        ("missing", [f"`{key}`" for key in expected if key not in state]),
        ("not this architecture's", [f"`{key}`" for key in state if key not in expected]),
        ("of other shapes", shapes),
        ("NaN or infinite", infinite),
        ("whole numbers, as in a quantized model", whole),
        ("zero throughout, as in a file that was not downloaded to its end", zero),
    ):
        if names:
            some = ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
            raise WeightsError(f"{len(names)} of the weights are {what} ({some})")


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
