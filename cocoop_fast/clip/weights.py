"""A CLIP with weights from an open_clip tag, a hub, or a file in open_clip's or OpenAI's format."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from torch import Tensor, nn

from cocoop_fast.files.torch_archive import is_script_archive, script_state_dict

HUB = "hf-hub:"
FOLDER = "local-dir:"
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
# OpenAI's files hold these numbers beside the weights. Its models have QuickGELU, which no weight shows.
_OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}


def create_clip(name: str, pretrained: str | None) -> nn.Module:
    """Build a CLIP and load its weights, without running code that a file holds.

    Args:
        name: an open_clip architecture; or ``hf-hub:<owner>/<repository>`` or ``local-dir:<folder>``, which hold
            architecture and weights, and take no `pretrained`.
        pretrained: an open_clip tag, a hub name, or a file: a state dict or training checkpoint (``.pt``,
            ``.bin``, ``.safetensors``), OpenAI's state dict, or a TorchScript archive, as OpenAI distributes.

    Raises:
        Exception: of any kind, if the weights cannot be had or are not those of the architecture.
    """
    if pretrained is not None and pretrained.startswith(HUB):
        pretrained = download_pretrained_from_hf(pretrained.removeprefix(HUB))
    state = None if pretrained is None else _openai_or_script_state(Path(pretrained))
    if state is None:
        return open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
    by_openai = _OPENAI_SIZES <= state.keys()
    model = open_clip.create_model(name, pretrained=None, force_quick_gelu=by_openai)
    # A script holds the causal mask like a weight; every model makes its own.
    others = [key for key in state if key in _OPENAI_SIZES or key.split(".")[-1] == "attn_mask"]
    model.load_state_dict({key: value for key, value in state.items() if key not in others})
    return model


def _openai_or_script_state(path: Path) -> dict[str, Tensor] | None:
    """The state dict of a file that open_clip does not read itself; None for all others, and for what is no file."""
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    if is_script_archive(path):
        return script_state_dict(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:  # the format of PyTorch before 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True)
    return content if isinstance(content, dict) and _OPENAI_SIZES <= content.keys() else None
