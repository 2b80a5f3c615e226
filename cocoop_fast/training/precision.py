"""Loss scaling: float16 gradients that would round to zero are computed larger and divided again in float32.

What each precision computes in is in docs/configuration.md. Whatever it is, what is learned and its momentum are
float32 master copies (unless ``optim.master_weights`` is off): a step of 1e-5 is lost on a float16 weight of 0.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cocoop_fast.errors import UserError

# Sixteen halvings past where the scaler starts (2^16) the loss is no longer scaled up at all; gradients that still
# overflow after sixteen more are not too large, they are broken.
_SMALLEST_SCALE = 2.0**-16


def needs_loss_scaling(precision: str, master_weights: bool, device: torch.device) -> bool:
    """Whether gradients pass through float16 on their way to float32 parameters.

    "amp" is bfloat16 on a CPU, with the range of float32. Without master weights the reference's fp16 is asked
    for, which does not scale.
    """
    if precision == "amp":
        return device.type == "cuda"
    return precision == "fp16" and master_weights


class LossScaler:
    """Dynamic loss scaling by torch's ``GradScaler``, which also counts the steps that it skipped.

    A step whose gradients overflow changes nothing but the scale, which is halved; so a scale that fell is a step
    that was skipped. On a GPU nothing here makes the host wait, except where that is said.

    Args:
        device: of loss and parameters.
        enabled: if not, the scale is 1 and every step is done.

    Attributes:
        enabled: gradients that are not finite are no fault, but a scale that was too large.
        skipped: steps of the run: scales that fell, and what the trainer left out.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        self._observed = self._scaler.get_scale()
        self.enabled = self._scaler.is_enabled()
        self._scale = torch.ones((), device=device)
        if self.enabled:
            self._scaler.scale(self._scale)  # makes its state on the device
            assert self._scaler._scale is not None
            self._scale = self._scaler._scale
        self.skipped = 0

    def current(self) -> Tensor:
        """The scale as a scalar on the device, float32: what the gradient of the loss by itself is to be. The next
        :meth:`step` changes it."""
        return self._scale

    def step(self, optimizer: torch.optim.Optimizer, overflow: Tensor | None = None) -> None:
        """Unscale the gradients, let the optimizer step if all are finite, and adapt the scale.

        Args:
            optimizer: of the parameters whose gradients were computed.
            overflow: scalar, whether one is infinite or NaN (1.0 or 0.0), if it is known already: then a fused optimizer
                unscales and steps in one launch, and one more adapts the scale. None: it is looked for.
        """
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if self.enabled and fused and overflow is not None:
            # What GradScaler does, without its search for what is not finite.
            scaler, told = self._scaler, vars(optimizer)
            assert scaler._growth_tracker is not None
            told["grad_scale"], told["found_inf"] = self._scale, overflow
            try:
                optimizer.step()
            finally:
                del told["grad_scale"], told["found_inf"]
            torch._amp_update_scale_(
                self._scale, scaler._growth_tracker, overflow,
                scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval(),
            )  # fmt: skip
            return
        self._scaler.step(optimizer)
        self._scaler.update()

    def observe(self, scale: float) -> None:
        """Tell the scale of a step, once for each step and in their order.

        Raises:
            UserError: gradients overflow however small the scale is.
        """
        if scale < self._observed:
            self.skipped += 1
        self._observed = scale
        if scale < _SMALLEST_SCALE:
            raise UserError(
                f"The gradients overflow in float16 even with the loss scaled by {scale:.0e} "
                f"({self.skipped} steps were skipped so far); use precision bf16 or fp32.",
                exit_status=1,
            )

    def settle(self) -> None:
        """Count the last step too. Waits for the device."""
        self.observe(self._scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """Plain values; none if not enabled and nothing was skipped. Waits for the device."""
        state = self._scaler.state_dict()
        return {**state, "skipped": self.skipped} if state or self.skipped else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. The scale of a state of the other kind (enabled or not) is left alone."""
        self.skipped = state.get("skipped", 0)
        scale = {name: value for name, value in state.items() if name != "skipped"}
        if scale and self.enabled:
            self._scaler.load_state_dict(scale)
            self._observed = self._scaler.get_scale()
