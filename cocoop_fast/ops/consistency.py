"""How far learned prompts have gone from hand-written ones: a term of the loss that keeps them near.

With g_k(x) the unit text feature of class k for image x, g0_k that of an ensemble of hand-written prompts, and z, z0 the
logits of an image with each,

    R = text_weight * d(g, g0) + logit_weight * mean_bk softmax(z0)_bk (log softmax(z0)_bk - log softmax(z)_bk)

where d is the mean of |g_bke - g0_ke| over images, classes and dimensions (PromptSRC, Khattak et al., ICCV 2023; both means are those of
the published computation) or the mean of 1 - g_bk . g0_k over images and classes (KgCoOp, Yao et al., CVPR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Distance = Literal["l1", "cosine"]


@dataclass(frozen=True)
class Anchor:
    """What text features are kept near.

    Args:
        features: (K, E) g0, of unit length, without a gradient.
        distance: of text features.
        text_weight, logit_weight: of the two terms.
    """

    features: Tensor
    distance: Distance
    text_weight: float
    logit_weight: float


def consistency_ref(
    text_features: Tensor, logits: Tensor, image_features: Tensor, scale: Tensor, anchor: Anchor
) -> Tensor:
    """R, differentiable.

    Args:
        text_features: (B, K, E) or (1, K, E), of any length.
        logits: (B, K) z.
        image_features: (B, E) of unit length.
        scale: scalar, exp(logit_scale).
        anchor: with features of this dtype.

    Returns:
        A scalar of the logits' dtype.
    """
    return weighed(distances_ref(text_features, anchor), logits, image_features, scale, anchor)


def distances_ref(text_features: Tensor, anchor: Anchor) -> Tensor:
    """(B, K) or (1, K), differentiable: d of each class, whose mean over images and classes is d(g, g0).

    Args:
        text_features: (B, K, E) or (1, K, E), of any length.
        anchor: of these classes, with features of this dtype.
    """
    unit = text_features / text_features.norm(dim=-1, keepdim=True)
    if anchor.distance == "l1":
        return (unit - anchor.features).abs().mean(dim=-1)
    return 1 - (unit * anchor.features).sum(dim=-1)


def weighed(
    distances: Tensor, logits: Tensor, image_features: Tensor, scale: Tensor, anchor: Anchor
) -> Tensor:
    """R, differentiable, of the distances of all classes.

    Args:
        distances: (B, K) or (1, K).
        logits, image_features, scale, anchor: as for :func:`consistency_ref`, of all classes.
    """
    told = anchor_logits(image_features, scale, anchor).to(logits.dtype)
    wanted = told.log_softmax(dim=1)
    divergence = (wanted.exp() * (wanted - logits.log_softmax(dim=1))).mean()
    return anchor.text_weight * distances.to(logits.dtype).mean() + anchor.logit_weight * divergence


def anchor_logits(image_features: Tensor, scale: Tensor, anchor: Anchor) -> Tensor:
    """(B, K) z0."""
    return (image_features * scale.to(image_features.dtype)) @ anchor.features.T


def consistency_fwd(
    text_features: Tensor, inverse_norms: Tensor, logits: Tensor, told: Tensor, anchor: Anchor
) -> Tensor:
    """R of text features that each image has of its own.

    An image at a time: beside its arguments it needs memory for the features of one.

    Args:
        text_features: (B, K, E).
        inverse_norms: (B, K) float32, of the text features.
        logits, told: (B, K) float32, z and z0.
        anchor: of these classes.

    Returns:
        A scalar in float32.
    """
    near = anchor.features.float()
    total = logits.new_zeros(())
    for features, inverse in zip(text_features, inverse_norms, strict=True):
        unit = features * inverse[:, None]
        total += (unit - near).abs_().sum() if anchor.distance == "l1" else (unit * near).sum()
    if anchor.distance == "l1":
        distance = total / text_features.numel()
    else:
        distance = 1 - total / logits.numel()
    wanted = told.log_softmax(dim=1)
    divergence = (wanted.exp() * (wanted - logits.log_softmax(dim=1))).mean()
    return anchor.text_weight * distance + anchor.logit_weight * divergence


def add_logit_gradient(
    grad_logits: Tensor, logits: Tensor, told: Tensor, grad_loss: Tensor, anchor: Anchor
) -> None:
    """Add dR/dz = logit_weight (softmax(z) - softmax(z0)) / (B K), times the loss's gradient.

    Args:
        grad_logits, logits, told: (B, K) float32; the first is added to.
        grad_loss: (1,) float32.
        anchor: of these classes.
    """
    if anchor.logit_weight:
        away = logits.softmax(dim=1) - told.softmax(dim=1)
        grad_logits.add_(away * (grad_loss * (anchor.logit_weight / logits.numel())))


def add_text_gradient(
    grad_text: Tensor, text_features: Tensor, inverse_norms: Tensor, grad_loss: Tensor, anchor: Anchor
) -> None:
    """Add the gradient of the distance by text features f: with g = f / |f| and s = dd/dg it is (s - g (g . s)) / |f|.

    Args:
        grad_text, text_features: (B, K, E); the first is added to.
        inverse_norms: (B, K) float32.
        grad_loss: (1,) float32.
        anchor: of these classes.
    """
    near = anchor.features.float()
    count = text_features.numel() if anchor.distance == "l1" else inverse_norms.numel()
    factor = grad_loss * (anchor.text_weight / count)
    for own, features, inverse in zip(grad_text, text_features, inverse_norms, strict=True):
        unit = features * inverse[:, None]
        slope = (unit - near).sign_() if anchor.distance == "l1" else -near
        along = (unit * slope).sum(dim=1, keepdim=True)
        own.add_((slope - unit * along) * (inverse[:, None] * factor))
