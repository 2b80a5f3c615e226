"""The learning rate of an epoch, as a pure function: nothing to save, nothing to go wrong on resuming."""

from __future__ import annotations

import math

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
