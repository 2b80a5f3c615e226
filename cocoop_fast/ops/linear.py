"""Frozen linear layers: the vendor's GEMM."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.clip.frozen import Affine


def linear_ref(x: Tensor, layer: Affine) -> Tensor:
    """y = x W^T + b.

    Args:
        x: (..., in).
        layer: weight (out, in) and bias (out,) or None, in the dtype of `x`.

    Returns:
        (..., out).
    """
    return F.linear(x, layer.weight, layer.bias)
