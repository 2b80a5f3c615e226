"""From context vectors and the shift of each image to prompts."""

from __future__ import annotations

import torch
from torch import Tensor


def assemble_context_ref(vectors: Tensor, shift: Tensor) -> Tensor:
    """v_m(x) = v_m + h_m(x) (paper, section 3.2).

    Args:
        vectors: (M, d) context vectors.
        shift: (B, d) of a Meta-Net, the same for all of them; or (B, M, d).

    Returns:
        (B, M, d).
    """
    return vectors[None] + (shift[:, None] if shift.ndim == 2 else shift)


def assemble_dense_ref(context: Tensor, prefix: Tensor, suffix: Tensor) -> Tensor:
    """The dense prompts [SOS] v_1(x) .. v_M(x) [class] . [EOT] [padding] of every image and class.

    Args:
        context: (B, M, d).
        prefix: (K, d) SOS embeddings.
        suffix: (K, L - 1 - M, d) embeddings of the class tokens, EOT and padding.

    Returns:
        (B, K, L, d).
    """
    b, k = len(context), len(prefix)
    return torch.cat(
        [
            prefix[:, None].expand(b, -1, -1, -1),
            context[:, None].expand(-1, k, -1, -1),
            suffix.expand(b, -1, -1, -1),
        ],
        dim=2,
    )
