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
from cocoop_fast.ops.step_report import StepReport
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
    # Scalar, 1.0 if a gradient is infinite or NaN, else 0.0; None: nobody looked.
    overflow: Tensor | None = None


Step = Callable[[Tensor, Tensor], StepResult]  # from features (B, E) and label (B,)


class HasLoss(Protocol):
    """A model, as far as a step needs it."""

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E) and (B,) to the scalar loss and the logits (B, K), detached."""


def loss_and_gradients(
    model: HasLoss, parameters: Sequence[Tensor], precision: str, scaler: LossScaler
) -> Step:
    """Forward and backward pass of a model.

    Args:
        model: ``loss_and_logits`` is differentiated.
        parameters: by which.
        precision: "amp" computes under autocast.
        scaler: its scale is read on the device.
    """

    # What a model does not compute by a backend, torch computes.
    reported = StepReport(getattr(model, "backend", "torch"))

    def step(features: Tensor, label: Tensor) -> StepResult:
        with autocast(precision, features.device):
            loss, logits = model.loss_and_logits(features, label)
        scale = scaler.current()
        # Those of the scaled loss: backward begins from the scale, and nothing multiplies.
        begin = scale.to(loss.dtype).view_as(loss)
        gradients = torch.autograd.grad(loss, parameters, begin, allow_unused=True)
        # Scaler and optimizer write into them, while autograd may hand out expanded tensors, or one for two parameters: they are
        # copied, all in one launch.
        there = [one for one in gradients if one is not None]
        report, flat, overflow = reported(loss, logits, label, scale, there)
        parts = flat.split([one.numel() for one in there])
        copies = iter([part.view_as(one).to(one.dtype) for part, one in zip(parts, there, strict=True)])
        own = tuple(None if one is None else next(copies) for one in gradients)
        return StepResult(report, own, getattr(model, "pruned", None), overflow)

    return step


def repeated_together(step: Step, group: Group) -> Step:
    """A step that fails on all ranks of a group if memory does not suffice on one: all have to repeat it.

    Args:
        step: of a part of the classes.
        group: those that share them.
    """
    return lambda features, label: group.all_or_none(lambda: step(features, label))


def summed_over_ranks(step: Step, ranks: Ranks) -> Step:
    """A step of all ranks together, each doing its part of the images and of the classes.

    Every rank gets the result of the whole, with the same bits.

    Args:
        step: this rank's part: the mean loss of its images, and its gradient through its classes.
        ranks: in their grid.
    """
    everyone, rows = ranks.everyone.size, ranks.images.size

    def whole(features: Tensor, label: Tensor) -> StepResult:
        own = step(features, label)
        there = [one for one in own.gradients if one is not None]
        pruned = own.report.new_tensor(astuple(own.pruned) if own.pruned else ())
        parts = (own.report[:2], pruned, *there)
        sums = ranks.everyone.sum(torch.cat([part.flatten().to(own.report.dtype) for part in parts]))
        told, left_out, *summed = sums.split([part.numel() for part in parts])

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

    return whole
