"""The demo CLIPs: tiny open_clip models that ship inside the package, so that everything runs offline.

Each is an ordinary ``open_clip.model.CLIP`` with open_clip's own tokenizer: ``demo``, trained by
``tools/pretrain_demo_clip.py`` on rendered glyphs of digits and letters, and ``icons``, trained by
``tools/pretrain_icons_clip.py`` on drawings by other designers than those of the data set of that name. Of a token
embedding only the rows that occur in training are stored: an asset stays below 6 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cocoop_fast.errors import UserError

_ASSETS = Path(__file__).parents[1] / "assets"
_TOKEN_WEIGHT = "token_embedding.weight"
_TOKEN_IDS = "token_ids"
_FILL_SEED = 0


@dataclass(frozen=True)
class DemoClip:
    """One of them.

    Args:
        knows: what its pictures show, for a sentence.
        embed_dim: E.
        vision, text: the towers, as open_clip's configurations spell them.
        image_mean, image_std: of a channel, all three alike.
        asset: file name of the weights.
        made_by: the script that trained it.
    """

    knows: str
    embed_dim: int
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    image_mean: float
    image_std: float
    asset: str
    made_by: str

    @property
    def path(self) -> Path:
        """The weights, inside the package."""
        return _ASSETS / self.asset

    def build(self) -> CLIP:
        """Its architecture with fresh weights from the global random state; QuickGELU; float32; training mode."""
        model = CLIP(self.embed_dim, dict(self.vision), dict(self.text), quick_gelu=True)
        mean, std = (self.image_mean,) * 3, (self.image_std,) * 3
        set_model_preprocess_cfg(
            model, asdict(PreprocessCfg(size=self.vision["image_size"], mean=mean, std=std))
        )
        return model


DEMO_CLIPS = {
    "demo": DemoClip(
        knows="digits and letters",
        embed_dim=128,
        vision={"layers": 4, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32},
        text={"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
        image_mean=0.3,
        image_std=0.36,
        asset="demo_clip.safetensors",
        made_by="tools/pretrain_demo_clip.py",
    ),
    "icons": DemoClip(
        knows="icons",
        embed_dim=128,
        vision={"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 64},
        text={"context_length": 77, "vocab_size": 49408, "width": 160, "heads": 5, "layers": 3},
        image_mean=0.5,
        image_std=0.3,
        asset="icons_clip.safetensors",
        made_by="tools/pretrain_icons_clip.py",
    ),
}


def save_demo_clip(model: CLIP, token_ids: torch.Tensor, path: Path, metadata: dict[str, str]) -> None:
    """Write `model` in half precision.

    Args:
        model: what `DemoClip.build` made, trained, with a token embedding of the n rows `token_ids` alone.
        token_ids: (n,) int64, sorted: the vocabulary's ids of those rows.
        path: the safetensors file to write.
        metadata: how the weights were made (strings only), stored in the file's header.
    """
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file({**weights, _TOKEN_IDS: token_ids.to(torch.int32)}, path, metadata)


def load_demo_clip(name: str = "demo", path: Path | None = None) -> CLIP:
    """A pretrained demo CLIP. Reads one file of the package; never touches the network.

    Token rows that were not trained (see `known_token_ids`) are drawn from a normal distribution with a fixed
    seed and the standard deviation of the trained rows: unknown words differ from each other, mean nothing,
    and are the same at every load.

    Args:
        name: a key of `DEMO_CLIPS`.
        path: a file written by `save_demo_clip` in place of the package's.

    Returns:
        CLIP: float32 on the CPU, in eval mode; `model.visual.image_mean`, `.image_std` and `.preprocess_cfg`
        are set.

    Raises:
        UserError: (a ValueError) no demo CLIP has this name; its file is missing, damaged, or of another architecture.
    """
    demo = _demo(name)
    path = path or demo.path
    weights = _read(path, demo)
    token_ids = weights.pop(_TOKEN_IDS, torch.empty(0)).long()
    rows = weights.pop(_TOKEN_WEIGHT, torch.empty(0))
    vocab, width = demo.text["vocab_size"], demo.text["width"]
    n = len(token_ids)
    if n == 0 or rows.shape != (n, width) or not 0 <= token_ids.min() <= token_ids.max() < vocab:
        raise _unusable(path, demo, "cannot be loaded (its token rows do not fit the vocabulary)")
    generator = torch.Generator().manual_seed(_FILL_SEED)
    table = torch.randn(vocab, width, generator=generator) * rows.std()
    table[token_ids] = rows

    with torch.random.fork_rng(devices=[]):
        model = demo.build()
    try:
        model.load_state_dict({**weights, _TOKEN_WEIGHT: table})
    except RuntimeError as error:
        raise _unusable(
            path, demo, "cannot be loaded (its weights are those of another architecture)"
        ) from error
    return model.eval()


@lru_cache
def known_token_ids(name: str = "demo", path: Path | None = None) -> frozenset[int]:
    """The token ids that a demo CLIP was trained on, those of start and end of text included.

    A class name with any other token is a word that this CLIP has never seen.

    Raises:
        UserError: the file is missing or damaged.
    """
    demo = _demo(name)
    return frozenset(_read(path or demo.path, demo).get(_TOKEN_IDS, torch.empty(0)).tolist())


def _demo(name: str) -> DemoClip:
    if name not in DEMO_CLIPS:
        raise UserError(f"There is no demo CLIP '{name}'; there are {' and '.join(DEMO_CLIPS)}.")
    return DEMO_CLIPS[name]


def _read(path: Path, demo: DemoClip) -> dict[str, torch.Tensor]:
    """All tensors of the asset; floating point ones as float32."""
    if not Path(path).is_file():
        raise _unusable(path, demo, "is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unusable(path, demo, f"cannot be loaded ({error})") from error
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _unusable(path: Path, demo: DemoClip, why: str) -> UserError:
    remedy = f"reinstall cocoop_fast or run {demo.made_by}"
    return UserError(f"the demo model {path} {why}: {remedy}", exit_status=1)
