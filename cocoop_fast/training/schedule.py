"""The learning rate of an epoch, as a pure function: nothing to save, nothing to go wrong on resuming."""

from __future__ import annotations

import math
from typing import Any

from cocoop_fast.config import OptimConfig


def learning_rate(optim: OptimConfig, epoch: int) -> float:
    """The rate of a 1-based epoch: constant warm-up, then a cosine.

    The reference steps a cosine scheduler of period ``epochs`` once per epoch, but only after the warm-up,
    and does not count the warm-up epochs as steps of the cosine. So the first epoch after the warm-up has the
    full rate, and the cosine never reaches zero: with one warm-up epoch of ten, epoch e >= 2 has
    lr/2 * (1 + cos(pi * (e - 2) / 10)), and the last one still a tenth of the full rate.
    """
    if epoch <= optim.warmup_epochs:
        return optim.warmup_lr
    cosine_epoch = epoch - 1 - optim.warmup_epochs
    return 0.5 * optim.lr * (1.0 + math.cos(math.pi * cosine_epoch / (optim.epochs or 1)))


def reference_state(optim: OptimConfig, epochs: int) -> dict[str, Any]:
    """Where the reference's scheduler stands after so many epochs, in plain numbers.

    Its warm-up scheduler counts up to the warm-up's end; from there on only the cosine that follows it counts. The
    reference itself stores that one as an object with an optimizer in it, whose rate is what moves after its resume
    (the run's own rate stays as it is). Without a warm-up there is the cosine alone.
    """
    warm, after = min(epochs, optim.warmup_epochs), max(epochs - optim.warmup_epochs, 0)
    rate = [learning_rate(optim, epochs + 1)]
    cosine = _scheduler_state(optim, after, rate if epochs >= optim.warmup_epochs else [optim.lr])
    if not optim.warmup_epochs:
        return cosine
    return {**_scheduler_state(optim, warm, rate), "successor": cosine}


def _scheduler_state(optim: OptimConfig, steps: int, rate: list[float]) -> dict[str, Any]:
    return {"base_lrs": [optim.lr], "last_epoch": steps, "_step_count": steps + 1, "_last_lr": rate}


def frozen_rate(optim: OptimConfig, epoch: int, *, resumed_in: int) -> float:
    """The rate of an epoch in a run that the reference resumes in another: it stays as it was there.

    A defect, for comparisons only: the reference's cosine goes on with a copy of the optimizer. The end of the warm-up
    still sets the run's own rate.
    """
    return learning_rate(optim, min(epoch, max(resumed_in, optim.warmup_epochs + 1)))
