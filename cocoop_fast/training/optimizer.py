"""The optimizer: plain SGD, as in the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cocoop_fast.config import OptimConfig


def build_optimizer(
    parameters: Sequence[Tensor], optim: OptimConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay.

    Args:
        parameters: may be empty: zero-shot CLIP learns nothing.
        optim: learning rate (until the schedule sets it), momentum and weight decay.
        fused: one kernel for all parameters, which also skips the step by itself if the loss scaler found an
            overflow; any other implementation makes the host wait for that answer.
    """
    optimizer = torch.optim.SGD(
        [{"params": parameters}],  # a group may be empty, a bare list may not
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        fused=fused or None,
    )
    if fused and optim.momentum:
        # The fused kernel takes its first step from uninitialised momentum. If the scaler skips that step, the
        # next one reads it. From zeros, the first step is the same: 0 * momentum + gradient.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizer.register_load_state_dict_post_hook(lambda loaded: _set_fused(loaded, fused))
    return optimizer


def _set_fused(optimizer: torch.optim.Optimizer, fused: bool) -> None:
    """A checkpoint says how the machine that wrote it stepped: what counts is this one."""
    for group in optimizer.param_groups:
        group["fused"] = fused or None
