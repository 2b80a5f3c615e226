"""From text features to logits and loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.ops.consistency import (
    Anchor,
    add_logit_gradient,
    add_text_gradient,
    anchor_logits,
    consistency_fwd,
    consistency_ref,
)
from cocoop_fast.ops.table import Ops, select_backend


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


def cosine_cross_entropy_ref(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    label: Tensor,
    anchor: Anchor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of :func:`cosine_logits_ref` against the labels.

    Args:
        image_features, text_features, logit_scale: as there.
        label: (B,) int64.
        anchor: adds :func:`cocoop_fast.ops.consistency.consistency_ref` to the loss.

    Returns:
        The scalar loss, in float32 where the features are narrower (there is no loss scale that a float16 loss could
        bear), and the logits (B, K), detached.
    """
    logits = cosine_logits_ref(image_features, text_features, logit_scale)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, label)
    if anchor is not None:
        loss = loss + consistency_ref(text_features, wide, image_features, logit_scale.exp(), anchor)
    return loss, logits.detach()


@torch.compiler.disable
def cosine_cross_entropy(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    label: Tensor,
    backend: str = "auto",
    anchor: Anchor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`cosine_cross_entropy_ref` by the best backend.

    The kernels differentiate by the text features alone, each image having its own; where a gradient of the image
    features or of the logit scale is wanted, the torch operations serve. On a GPU nothing waits for the device.
    """
    fixed = not (image_features.requires_grad or logit_scale.requires_grad)
    per_image = len(text_features) == len(image_features)
    same_type = image_features.dtype == text_features.dtype and logit_scale.numel() == 1
    if fixed and per_image and same_type:
        chosen = select_backend(text_features.device, text_features.dtype, backend)
        if chosen.load is not None:
            log_scale = logit_scale.detach().float().reshape(1)
            loss, logits = _CosineCrossEntropy.apply(
                text_features, image_features, log_scale, label, chosen.load(), anchor
            )
            return loss, logits
    return cosine_cross_entropy_ref(image_features, text_features, logit_scale, label, anchor)


class _CosineCrossEntropy(torch.autograd.Function):
    """The logarithm of the scale, logits, loss and its gradient are float32, and stay on the device."""

    @staticmethod
    def forward(
        node: Any,
        text_features: Tensor,
        image_features: Tensor,
        log_scale: Tensor,
        label: Tensor,
        ops: Ops,
        anchor: Anchor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, classes, _ = text_features.shape
        image, label = image_features.contiguous(), label.to(torch.int64).contiguous()
        logits, inverse_norms = (log_scale.new_empty(batch, classes) for _ in range(2))  # both aligned
        ops.head_fwd(text_features, image, log_scale, logits, inverse_norms)
        loss = torch.empty_like(log_scale)
        ops.cross_entropy_fwd(logits, label, loss)
        node.ops, node.anchor = ops, anchor
        node.set_materialize_grads(False)  # or zeros (B, K) are made for the logits, which have none
        told = None
        if anchor is not None:
            told = anchor_logits(image, log_scale.exp(), anchor).float()
            loss += consistency_fwd(text_features, inverse_norms, logits, told, anchor)
        node.save_for_backward(text_features, image, log_scale, logits, inverse_norms, label, told)
        node.mark_non_differentiable(logits)
        return loss.squeeze(0), logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(node: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        text_features, image, log_scale, logits, inverse_norms, label, told = node.saved_tensors
        grad_loss, anchor = grad_loss.reshape(1), node.anchor
        grad_logits = torch.empty_like(logits)
        node.ops.cross_entropy_bwd(logits, label, grad_loss, grad_logits)
        if anchor is not None:
            add_logit_gradient(grad_logits, logits, told, grad_loss, anchor)
        grad_text = torch.empty_like(text_features, memory_format=torch.contiguous_format)
        node.ops.head_bwd(text_features, image, log_scale, logits, inverse_norms, grad_logits, grad_text)
        if anchor is not None:
            add_text_gradient(grad_text, text_features, inverse_norms, grad_loss, anchor)
        return grad_text, None, None, None, None, None
