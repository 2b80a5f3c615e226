"""What tells one CLIP's weights from another's, in whatever precision they are loaded."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.files.tensors import tensor_bytes

_LOW = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def fingerprint(model: Any) -> dict[str, str]:
    """Digests of all weights of a CLIP, rounded to float16 and to bfloat16, and of what else its numbers depend on.

    float32 weights have both. Those that were rounded already have that one alone: what was learned on float16 weights can be
    compared with the same in float32.
    """
    frozen = FrozenCLIP(model)
    text = frozen.text_weights()
    kinds = [frozen.dtype] if frozen.dtype in _LOW else list(_LOW)
    digests = {kind: hashlib.sha256(f"{text.activation} {text.heads}".encode()) for kind in kinds}
    parameters = {name.removeprefix("text."): value for name, value in model.named_parameters()}
    for name, value in sorted(parameters.items()):
        for kind, digest in digests.items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value.detach().cpu().to(kind)))
    return {_LOW[kind]: digest.hexdigest() for kind, digest in digests.items()}
