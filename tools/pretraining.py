"""What the scripts that pretrain the demo CLIPs share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from cocoop_fast.clip.demo import DemoClip


def options(
    about: str | None, demo: DemoClip, *, scored_on: str, steps: int, batch: int, log_every: int
) -> argparse.ArgumentParser:
    """Those that the scripts have in common; the numbers are defaults."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=demo.path, help="file to write, or with --evaluate to read"
    )
    parser.add_argument("--evaluate", action="store_true", help=f"score --out on the {scored_on} and stop")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="images a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=log_every)
    return parser


def uniform(shape, low: float, high: float, rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng) * (high - low) + low


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Mean over the positive pairs (i, j) of log(1 + sum over negatives n of exp(s_in - s_ij)), both ways.

    Args:
        logits: (images, captions) scaled cosines.
        positive: same shape, bool: the caption is true of the image.
    """
    total = logits.new_zeros(())
    for s, p in ((logits, positive), (logits.T, positive.T)):
        negatives = s.masked_fill(p, float("-inf")).logsumexp(1, keepdim=True)
        pairs = F.softplus(negatives - s) * p
        count = p.sum(1)
        total = total + (pairs.sum(1) / count.clamp_min(1)).sum() / (count > 0).sum() / 2
    return total


def make_optimizer(
    model: CLIP, lr: float, weight_decay: float, slow: float, scale: float
) -> torch.optim.AdamW:
    """AdamW; every group has the ``rate`` that the learning rate is to be multiplied by.

    Args:
        weight_decay: of matrices.
        slow: rate of token rows and positions. They stay small, as in CLIP: contexts learned at CLIP's learning rates
            must be able to move them.
        scale: rate of the logit scale.
    """
    rows = [model.token_embedding.weight, model.positional_embedding]
    plain = [p for p in model.parameters() if p.ndim == 1]
    special = {id(p) for p in [*rows, *plain, model.logit_scale]}
    groups = [
        {
            "params": [p for p in model.parameters() if id(p) not in special],
            "weight_decay": weight_decay,
            "rate": 1.0,
        },
        {"params": plain, "weight_decay": 0.0, "rate": 1.0},
        {"params": rows, "weight_decay": 0.0, "rate": slow},
        {"params": [model.logit_scale], "weight_decay": 0.0, "rate": scale},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


@torch.no_grad()
def move_average(average: CLIP, model: CLIP, step: int, decay: float) -> None:
    """Move the running mean of the weights towards them, faster at first; statistics of batches are means already."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - min(decay, step / (step + 10)))
    for mean, value in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(value)
