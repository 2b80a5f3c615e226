"""Tail pruning: backward through the classes that matter to the loss, with a bound on what is left out.

The gradient of an image's loss is a sum over the classes, weighted by p_k - y_k: 2 (1 - p_label) in absolute value
together. CLIP's logit scale makes the softmax peaked, so most classes have next to no weight. Classes whose
probabilities add up to at most tau (1 - p_label) are left out: at most a tau / 2 share of the weights. The other wrong
classes take over their probability in proportion, so that the weights still sum to zero: class features are much alike,
and what they have in common must cancel as it does in the exact gradient. In all, the weights move by at most a tau
share.

The pass over all classes then saves nothing. Backward goes through the rows of the classes kept, with a forward of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.engine.constants import current_autocast
from cocoop_fast.engine.contexts import Contexts, ShiftedContext
from cocoop_fast.engine.encoder import TreeTextEncoder
from cocoop_fast.errors import UserError
from cocoop_fast.ops.head import cosine_logits_ref


@dataclass(frozen=True)
class Pruned:
    """What a step left out."""

    classes_kept: int  # backward went through them
    share_left_out: float  # of the weights |p_k - y_k| of the gradient, the mean over the images


def check_prune_mass(tau: float) -> float:
    """
    Raises:
        UserError: not in 0 <= tau < 1.
    """
    if not 0 <= tau < 1:
        raise UserError(f"`prune_mass` must be at least 0 (exact) and below 1, got {tau}.")
    return float(tau)


def classes_to_keep(probabilities: Tensor, label: Tensor, tau: float) -> Tensor:
    """The label and the likeliest classes of each image, so that those left out have at most tau (1 - p_label).

    Args:
        probabilities: (B, K), each row summing to one.
        label: (B,) int64.
        tau: the mass that may be left out, as a share of what the label does not have.

    Returns:
        (B, K) bool.
    """
    others = probabilities.double().scatter(1, label[:, None], 0.0)
    ascending, order = others.sort(dim=1)
    allowed = tau * others.sum(dim=1, keepdim=True)
    left_out = ascending.cumsum(dim=1) <= allowed
    keep = torch.ones_like(left_out).scatter(1, order, ~left_out)
    return keep.scatter(1, label[:, None], True)


@dataclass(frozen=True)
class Kept:
    """The classes that backward goes through.

    Args:
        classes: (n,) int64, ascending.
        weights: (B, n) the gradient of the mean cross-entropy by their logits.
        pruned: what is left out.
    """

    classes: Tensor
    weights: Tensor
    pruned: Pruned


def choose_classes(logits: Tensor, label: Tensor, tau: float) -> Kept:
    """The classes that are worth it to some image of a batch. Each image has weights on its own alone, so that the gradient
    of a batch is the mean of its images', however they are shared out.

    Args:
        logits: (B, K).
        label: (B,) int64.
        tau: see :func:`classes_to_keep`.
    """
    probabilities = _wide(logits).softmax(dim=1)
    keep = classes_to_keep(probabilities, label, tau)
    classes = keep.any(dim=0).nonzero()[:, 0]
    is_label = classes == label[:, None]
    others = probabilities[:, classes].masked_fill(is_label | ~keep[:, classes], 0.0)
    # 1 - p_label, free of cancellation
    total = probabilities.scatter(1, label[:, None], 0.0).sum(dim=1, keepdim=True)
    kept, tiny = others.sum(dim=1, keepdim=True), torch.finfo(probabilities.dtype).tiny
    weights = torch.where(is_label, -total, others * (total / kept.clamp(min=tiny)))
    left_out = (total - kept).clamp(min=0) / (2 * total).clamp(min=tiny)
    return Kept(classes, weights / len(label), Pruned(len(classes), float(left_out.mean())))


def backward_through(
    encoder: TreeTextEncoder,
    contexts: Contexts,
    image_features: Tensor,
    logit_scale: Tensor,
    loss: Tensor,
    classes: Tensor,
    weights: Tensor,
) -> Tensor:
    """A loss that is known, whose gradient by the contexts goes through the logits of some classes.

    Backward does all the work, under the scale that the loss has there: in fp16 the weights of unlikely classes would be
    nothing without it.

    Args:
        encoder, contexts, image_features, logit_scale: as for :func:`pruned_cross_entropy`.
        loss: scalar.
        classes: (n,) int64; there may be none.
        weights: (B, n) the gradient of the loss by their logits.
    """
    parts = [contexts.vectors, contexts.shift] if isinstance(contexts, ShiftedContext) else [contexts]
    text_weights = encoder.frozen.text_weights()
    versions = text_weights.versions()
    image_features, logit_scale = image_features.detach(), logit_scale.detach()

    def gradients(grad_loss: Tensor) -> Sequence[Tensor]:
        text_weights.check_unchanged(versions)
        leaves = [part.detach().requires_grad_() for part in parts]
        if not len(classes):
            return [torch.zeros_like(leaf) for leaf in leaves]
        own = ShiftedContext(*leaves) if isinstance(contexts, ShiftedContext) else leaves[0]
        text = _batched(encoder.encode_classes(own, classes))
        logits = cosine_logits_ref(image_features, text, logit_scale)
        scaled = weights * grad_loss
        return torch.autograd.grad(logits, leaves, scaled.to(logits.dtype))

    with_gradient: Tensor = _WithGradient.apply(loss, gradients, *parts)
    return with_gradient


def pruned_cross_entropy(
    encoder: TreeTextEncoder,
    contexts: Contexts,
    image_features: Tensor,
    logit_scale: Tensor,
    label: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor, Pruned]:
    """The mean cross-entropy over all classes, with the gradient of the classes worth it.

    Args:
        encoder: of the K prompts.
        contexts: as for :class:`TreeTextEncoder`. The loss is differentiated by them alone.
        image_features: (B, E) of unit length.
        logit_scale: scalar, the log of the scale.
        label: (B,) int64.
        tau: see :func:`classes_to_keep`; the exact gradient is what 0 stands for elsewhere.

    Returns:
        The scalar loss, the logits (B, K), detached, and what was left out.
    """
    with torch.no_grad():
        logits = cosine_logits_ref(image_features, _batched(encoder(contexts.detach())), logit_scale)
        loss = F.cross_entropy(_wide(logits), label)
        kept = choose_classes(logits, label, tau)
    loss = backward_through(encoder, contexts, image_features, logit_scale, loss, kept.classes, kept.weights)
    return loss, logits, kept.pruned


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _batched(features: Tensor) -> Tensor:
    """(K, E) features, the same for all images, as (1, K, E)."""
    return features if features.ndim == 3 else features[None]


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient something else computes."""

    @staticmethod
    def forward(
        node: Any, loss: Tensor, gradients: Callable[[Tensor], Sequence[Tensor]], *parts: Tensor
    ) -> Tensor:
        node.gradients, node.autocast = gradients, current_autocast(loss.device)
        node.save_for_backward(*parts)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(node: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        _ = (
            node.saved_tensors
        )  # torch refuses contexts changed in place, and a second backward over a graph not retained
        with torch.enable_grad(), node.autocast:
            return None, None, *node.gradients(grad_loss)
