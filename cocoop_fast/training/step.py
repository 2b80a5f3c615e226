"""One step up to its gradients: nothing in it makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cocoop_fast.evaluation.classifier import PromptClassifier
from cocoop_fast.evaluation.evaluate import autocast
from cocoop_fast.pruning import Pruned
from cocoop_fast.training.precision import LossScaler


class StepResult(NamedTuple):
    """What a step computes from image features and labels.

    ``report`` (3,) holds, on the device, what the host wants to know: the loss, how many images were classified
    right, and the loss scale; float32, or float64 if the loss is. ``gradients`` are those of the scaled loss, one
    for each parameter, ``None`` where the loss does not depend on it.
    """

    report: Tensor
    gradients: tuple[Tensor | None, ...]
    pruned: Pruned | None = None  # what was left out of the gradient


Step = Callable[[Tensor, Tensor], StepResult]  # from features (B, E) and label (B,)


class LossAndGradients:
    """Forward and backward pass of a model: a :data:`Step`.

    Args:
        model: ``loss_and_logits`` is differentiated.
        parameters: by which.
        precision: "amp" computes under autocast.
        scaler: its scale is read on the device.
    """

    def __init__(
        self,
        model: PromptClassifier,
        parameters: Sequence[Tensor],
        precision: str,
        scaler: LossScaler,
    ) -> None:
        self._model = model
        self._parameters = tuple(parameters)
        self._precision = precision
        self._scaler = scaler

    def __call__(self, features: Tensor, label: Tensor) -> StepResult:
        with autocast(self._precision, features.device):
            loss, logits = self._model.loss_and_logits(features, label)
        gradients = torch.autograd.grad(self._scaler.scale(loss), self._parameters, allow_unused=True)
        # Scaler and optimizer write into them: autograd may hand out expanded tensors, or one for two parameters.
        own = tuple(
            None if one is None else one.clone(memory_format=torch.contiguous_format) for one in gradients
        )
        correct = (logits.argmax(dim=1) == label).sum()
        wide = torch.promote_types(loss.dtype, torch.float32)
        report = torch.stack([value.detach().to(wide) for value in (loss, correct, self._scaler.current())])
        return StepResult(report, own, getattr(self._model, "pruned", None))
