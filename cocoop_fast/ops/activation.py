"""The MLP's activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activation_ref(u: Tensor, kind: str) -> Tensor:
    """QuickGELU, u * sigmoid(1.702 u), or the exact GELU, u * Phi(u).

    Args:
        u: (..., 4d) pre-activations, bias included.
        kind: "quick_gelu" or "gelu".

    Returns:
        The same shape and dtype.
    """
    if kind == "quick_gelu":
        return u * torch.sigmoid(1.702 * u)
    return F.gelu(u)
