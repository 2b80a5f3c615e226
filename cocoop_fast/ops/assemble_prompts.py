"""From learned context and Meta-Net bias to prompts."""

from __future__ import annotations

import torch
from torch import Tensor


def assemble_context_ref(ctx: Tensor, bias: Tensor) -> Tensor:
    """v_m(x) = v_m + h_theta(x) (paper, section 3.2).

    Args:
        ctx: (M, d) context vectors.
        bias: (B, d) Meta-Net outputs.

    Returns:
        (B, M, d).
    """
    return ctx[None] + bias[:, None]


def assemble_prompts_ref(context: Tensor, prefix: Tensor, suffix: Tensor) -> Tensor:
    """The dense prompts [SOS] v_1(x) .. v_M(x) [class] . [EOT] [padding] of every image and class.

    Args:
        context: (B, M, d).
        prefix: (K, 1, d) SOS embeddings.
        suffix: (K, L - 1 - M, d) embeddings of the class tokens, EOT and padding.

    Returns:
        (B, K, L, d).
    """
    b, k = len(context), len(prefix)
    return torch.cat(
        [
            prefix.expand(b, -1, -1, -1),
            context[:, None].expand(-1, k, -1, -1),
            suffix.expand(b, -1, -1, -1),
        ],
        dim=2,
    )
