"""The demo CLIP: a tiny open_clip model that ships inside the package, so that everything runs offline.

It is an ordinary ``open_clip.model.CLIP`` with open_clip's own tokenizer, trained by
``tools/pretrain_demo_clip.py`` on rendered glyphs of digits and letters. Of the token embedding only the rows
that occur in the training captions are stored: the asset stays below 3 MB.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cocoop_fast.errors import UserError

ASSET = Path(__file__).parents[1] / "assets" / "demo_clip.safetensors"
DEMO_IMAGE_SIZE = 32
DEMO_IMAGE_MEAN = (0.3, 0.3, 0.3)
DEMO_IMAGE_STD = (0.36, 0.36, 0.36)

_EMBED_DIM = 128
_VISION = {"layers": 4, "width": 128, "head_width": 64, "patch_size": 8, "image_size": DEMO_IMAGE_SIZE}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}
_TOKEN_WEIGHT = "token_embedding.weight"
_TOKEN_IDS = "token_ids"
_FILL_SEED = 0


def build_demo_clip() -> CLIP:
    """The demo architecture with fresh weights from the global random state.

    Returns:
        CLIP: ViT (32x32, patch 8, 4 layers) and causal text transformer (3 layers), both of width 128 with
            two heads of 64; E = 128; QuickGELU; float32; training mode.
    """
    model = CLIP(_EMBED_DIM, _VISION, _TEXT, quick_gelu=True)
    preprocess = PreprocessCfg(size=DEMO_IMAGE_SIZE, mean=DEMO_IMAGE_MEAN, std=DEMO_IMAGE_STD)
    set_model_preprocess_cfg(model, asdict(preprocess))
    return model


def save_demo_clip(model: CLIP, token_ids: torch.Tensor, path: Path, metadata: dict[str, str]) -> None:
    """Write `model` in half precision.

    Args:
        model: what `build_demo_clip` made, trained, with a token embedding of the n rows `token_ids` alone.
        token_ids: (n,) int64, sorted: the vocabulary's ids of those rows.
        path: the safetensors file to write.
        metadata: how the weights were made (strings only), stored in the file's header.
    """
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file({**weights, _TOKEN_IDS: token_ids.to(torch.int32)}, path, metadata)


def load_demo_clip(path: Path = ASSET) -> CLIP:
    """The pretrained demo CLIP. Reads one file of the package; never touches the network.

    Token rows that were not trained (see `known_token_ids`) are drawn from a normal distribution with a fixed
    seed and the standard deviation of the trained rows: unknown words differ from each other, mean nothing,
    and are the same at every load.

    Args:
        path: the asset; another file written by `save_demo_clip` may be named instead.

    Returns:
        CLIP: float32 on the CPU, in eval mode; `model.visual.image_mean`, `.image_std` and `.preprocess_cfg`
        are set.

    Raises:
        UserError: (a ValueError) the file is missing, damaged, or of another architecture.
    """
    weights = _read(path)
    token_ids = weights.pop(_TOKEN_IDS, torch.empty(0)).long()
    rows = weights.pop(_TOKEN_WEIGHT, torch.empty(0))
    vocab, width = _TEXT["vocab_size"], _TEXT["width"]
    n = len(token_ids)
    if n == 0 or rows.shape != (n, width) or not 0 <= token_ids.min() <= token_ids.max() < vocab:
        raise _unusable(path, "cannot be loaded (its token rows do not fit the vocabulary)")
    generator = torch.Generator().manual_seed(_FILL_SEED)
    table = torch.randn(vocab, width, generator=generator) * rows.std()
    table[token_ids] = rows

    with torch.random.fork_rng(devices=[]):
        model = build_demo_clip()
    try:
        model.load_state_dict({**weights, _TOKEN_WEIGHT: table})
    except RuntimeError as error:
        raise _unusable(path, "cannot be loaded (its weights are those of another architecture)") from error
    return model.eval()


@lru_cache
def known_token_ids(path: Path = ASSET) -> frozenset[int]:
    """The token ids that the demo CLIP was trained on, those of start and end of text included.

    A class name with any other token is a word that the demo CLIP has never seen.

    Raises:
        UserError: the file is missing or damaged.
    """
    return frozenset(_read(path).get(_TOKEN_IDS, torch.empty(0)).tolist())


def _read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the asset; floating point ones as float32."""
    if not Path(path).is_file():
        raise _unusable(path, "is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unusable(path, f"cannot be loaded ({error})") from error
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _unusable(path: Path, why: str) -> UserError:
    remedy = "reinstall cocoop_fast or run tools/pretrain_demo_clip.py"
    return UserError(f"the demo model {path} {why}: {remedy}", exit_status=1)
