"""One step up to its gradients: nothing in it makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cocoop_fast.distributed.ranks import Group, Ranks
from cocoop_fast.engine.pruning import Pruned
from cocoop_fast.evaluation.evaluate import autocast
from cocoop_fast.training.precision import LossScaler


class StepResult(NamedTuple):
    """What a step computes from image features and labels.

    ``report`` (4,) holds, on the device, what the host wants to know: the loss, how many images were classified
    right, the loss scale, and the gradients' largest absolute value (NaN if one is); float32, or float64 if the loss
    is. ``gradients`` are those of the scaled loss, one for each parameter, ``None`` where the loss does not depend on
    it.
    """

    report: Tensor
    gradients: tuple[Tensor | None, ...]
    pruned: Pruned | None = None  # what was left out of the gradient


Step = Callable[[Tensor, Tensor], StepResult]  # from features (B, E) and label (B,)


class HasLoss(Protocol):
    """A model, as far as a step needs it."""

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E) and (B,) to the scalar loss and the logits (B, K), detached."""


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
        model: HasLoss,
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
        largest = torch.cat([one.flatten() for one in own if one is not None]).abs().max()
        told = (loss, correct, self._scaler.current(), largest)
        report = torch.stack([value.detach().to(wide) for value in told])
        return StepResult(report, own, getattr(self._model, "pruned", None))


class RepeatedTogether:
    """A :data:`Step` that fails on all ranks of a group if memory does not suffice on one: all have to repeat it.

    Args:
        step: of a part of the classes.
        group: those that share them.
    """

    def __init__(self, step: Step, group: Group) -> None:
        self._step = step
        self._group = group

    def __call__(self, features: Tensor, label: Tensor) -> StepResult:
        return self._group.all_or_none(lambda: self._step(features, label))


class SummedOverRanks:
    """A :data:`Step` of all ranks together, each doing its part of the images and of the classes.

    Every rank gets the result of the whole, with the same bits.

    Args:
        step: this rank's part: the mean loss of its images, and its gradient through its classes.
        ranks: in their grid.
    """

    def __init__(self, step: Step, ranks: Ranks) -> None:
        self._step = step
        self._ranks = ranks

    def __call__(self, features: Tensor, label: Tensor) -> StepResult:
        own = self._step(features, label)
        there = [one for one in own.gradients if one is not None]
        pruned = own.report.new_tensor(astuple(own.pruned) if own.pruned else ())
        parts = (own.report[:2], pruned, *there)
        sums = self._ranks.everyone.sum(torch.cat([part.flatten().to(own.report.dtype) for part in parts]))
        told, left_out, *summed = sums.split([part.numel() for part in parts])

        everyone, rows = self._ranks.everyone.size, self._ranks.images.size
        gradients = iter(
            [(one / rows).to(part.dtype).view_as(part) for one, part in zip(summed, there, strict=True)]
        )
        loss, correct = told[0] / everyone, told[1] * rows / everyone  # those of a row have the same ones
        largest = torch.cat(summed).abs().max() / rows
        kept, share = (left_out / everyone).tolist() if own.pruned else (0, 0)
        return StepResult(
            torch.stack([loss, correct, own.report[2], largest]),
            tuple(None if one is None else next(gradients) for one in own.gradients),
            Pruned(round(kept), share) if own.pruned else None,
        )
