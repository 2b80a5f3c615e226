"""The mean of what was learned over the epochs, those near the end weighing most (PromptSRC's Gaussian aggregation)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MEAN = 0.75  # of the epochs; the published 15 of 20
_DEVIATION = 1.0  # epochs


class GaussianAverage:
    """sum_e w_e theta_e over epochs 1 to n, with w_e in proportion to exp(-(e - 0.75 n)^2 / 2) and a sum of one.

    Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023, section 3.3.

    Args:
        parameters: theta.
        epochs: n.
    """

    def __init__(self, parameters: Sequence[Tensor], epochs: int) -> None:
        self._parameters = parameters
        weights = [math.exp(-(((e - _MEAN * epochs) / _DEVIATION) ** 2) / 2) for e in range(1, epochs + 1)]
        self.weights = [weight / sum(weights) for weight in weights]
        self._sums = [torch.zeros_like(one) for one in parameters]

    @torch.no_grad()
    def add(self, epoch: int) -> None:
        """Take the parameters in as they are at the end of a 1-based epoch; after the last, they become the mean."""
        for total, one in zip(self._sums, self._parameters, strict=True):
            total.add_(one, alpha=self.weights[epoch - 1])
        if epoch == len(self.weights):
            for total, one in zip(self._sums, self._parameters, strict=True):
                one.copy_(total)

    def state_dict(self) -> dict[str, Any]:
        """The sum so far, of each parameter by its number."""
        return {str(number): total for number, total in enumerate(self._sums)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for number, total in enumerate(self._sums):
            total.copy_(state[str(number)])
