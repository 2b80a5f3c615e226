"""A digest of all that decides the features of a list of images under a frozen image encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

from torch import nn

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.files.tensors import tensor_bytes

_VERSION = 2  # of the files' format and of how images are decoded
_WEIGHT_DIGESTS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # hashing a ViT-B/16 takes 0.2 s


def feature_key(clip: LoadedClip, dataset: Dataset, samples: Sequence[Sample], transform: object) -> str:
    """The encoder's weights and structure, the precision, the transform, the images with their sizes and times of change.

    Args:
        clip: whose image encoder it is.
        dataset: its name and its reader's folder enter.
        samples: the images in their order; labels do not enter.
        transform: a dataclass, or anything else whose ``repr`` says all about it, the random draws included.
    """
    digest = hashlib.sha256()
    decides = [_VERSION, _weights_digest(clip), clip.precision, repr(transform), dataset.name]
    digest.update(json.dumps(decides).encode())
    root = getattr(dataset.read, "root", None)  # images in files have one, embedded images have not
    for sample in samples:
        digest.update(f"{sample.source}\t{_state(root, sample)}\n".encode())
    return digest.hexdigest()


def _state(root: Path | None, sample: Sample) -> str:
    """Changes when an image's file does; "" for embedded images and for files that are not there."""
    if root is None:
        return ""
    try:
        stat = (root / str(sample.source)).stat()
    except OSError:
        return ""
    return f"{stat.st_size}\t{stat.st_mtime_ns}"


def _weights_digest(clip: LoadedClip) -> str:
    """Of the image tower: its structure (which activation, how many heads) and every tensor, byte for byte."""
    visual = cast(nn.Module, clip.model.visual)
    if visual not in _WEIGHT_DIGESTS:
        digest = hashlib.sha256(f"{clip.name}\n{visual!r}".encode())
        for name, value in sorted(visual.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        _WEIGHT_DIGESTS[visual] = digest.hexdigest()
    return _WEIGHT_DIGESTS[visual]
