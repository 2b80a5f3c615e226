"""LayerNorm over rows, with statistics in float32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.clip.frozen import Affine


def layer_norm_ref(x: Tensor, norm: Affine) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over the last dimension.

    Half-precision rows are normalised in float32 and rounded once at the end, as CLIP's own LayerNorm does.

    Args:
        x: (..., d), any float dtype.
        norm: weight (d,), bias (d,) and eps.

    Returns:
        (..., d) in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), (x.shape[-1],), norm.weight.to(wide), norm.bias.to(wide), norm.eps)
    return y.to(x.dtype)
