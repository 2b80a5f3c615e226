"""From text features to logits."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_logits_ref(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """logit_bk = exp(logit_scale) * cos(image_b, text_bk) (paper, equation 1, with tau = exp(-logit_scale)).

    Args:
        image_features: (B, E), already of unit length.
        text_features: (B, K, E) or, the same for all images, (1, K, E); any length.
        logit_scale: scalar, the log of the scale.

    Returns:
        (B, K).
    """
    text = text_features / text_features.norm(dim=-1, keepdim=True)
    image = image_features * logit_scale.exp().to(image_features.dtype)
    if len(text) == 1:
        return image @ text[0].T
    return torch.einsum("be,bke->bk", image, text)
