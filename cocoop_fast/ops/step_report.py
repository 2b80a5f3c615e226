"""What a training step tells its host and its optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cocoop_fast.ops.table import select_small_ops


def step_report_ref(
    loss: Tensor, logits: Tensor, label: Tensor, scale: Tensor, gradients: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss, how many images have the highest logit at their label, the loss scale, and the gradients' largest absolute
    value (NaN if one is).

    Args:
        loss, scale: scalars.
        logits: (B, K).
        label: (B,) int64.
        gradients: one or more, of n numbers in all.

    Returns:
        The report (4,), float32, or float64 if the loss is; and the gradients one after the other, (n,).
    """
    flat = torch.cat([one.flatten() for one in gradients])
    wide = torch.promote_types(loss.dtype, torch.float32)
    right = (logits.argmax(dim=1) == label).sum(dtype=wide)
    told = (loss, right, scale, torch.linalg.vector_norm(flat, math.inf))
    return torch.stack([value.detach().to(wide) for value in told]), flat


class StepReport:
    """:func:`step_report_ref` by the best backend: where kernels are launched, one kernel.

    Args:
        backend: see :func:`cocoop_fast.ops.table.select_backend`.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._shared: dict[torch.device, Tensor] = {}  # what the programs of a launch have in common

    def __call__(
        self, loss: Tensor, logits: Tensor, label: Tensor, scale: Tensor, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :func:`step_report_ref`; and, if it comes with the rest, whether a gradient is infinite or NaN: a scalar that
        is 1.0 or 0.0, as torch's fused optimizers read it."""
        floats = (loss, logits, scale, *gradients)
        plain = logits.ndim == 2 and len(label) > 0 and all(one.dtype == torch.float32 for one in floats)
        small = select_small_ops(logits.device, torch.float32, self._backend) if plain else None
        if small is None:
            return *step_report_ref(loss, logits, label, scale, gradients), None
        if len(gradients) > small.MOST_GRADIENTS:
            gradients = [torch.cat([one.flatten() for one in gradients])]
        shared = self._shared.get(logits.device)
        if shared is None:
            shared = self._shared[logits.device] = label.new_zeros(3, dtype=torch.int32)
        copies, report = loss.new_empty(sum(one.numel() for one in gradients)), loss.new_empty(5)
        read = [one.contiguous() for one in gradients]
        small.step_report(
            loss.detach().view(()), logits.contiguous(), label.contiguous(), scale.view(()), read, copies, shared, report
        )  # fmt: skip
        return report[:4], copies, report[4]
