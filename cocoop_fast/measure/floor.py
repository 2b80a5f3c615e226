"""The floor: the tree's matrix multiplications and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import TextWeights


class GemmFloor:
    """Forward and input-gradient GEMMs of all R rows in all layers, into buffers that exist already.

    Nothing is skipped (the engine skips about 7 percent: layer 0's constants, all but the EOT rows in the last
    layer), nothing is added: no bias, no residual, no attention. Inputs are fixed random rows.

    Args:
        weights: the text tower.
        rows: B R.
    """

    def __init__(self, weights: TextWeights, rows: int) -> None:
        d, wide = weights.width, weights.blocks[0].fc.weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.weights = weights
        widths = {d, 3 * d, wide}
        self.rows: dict[int, Tensor] = {
            width: torch.randn(rows, width, generator=generator) for width in widths
        }
        self.out: dict[int, Tensor] = {width: torch.empty(rows, width) for width in widths}

    def forward(self) -> None:
        """The four linear layers of each block: y = x W^T."""
        for block in self.weights.blocks:
            for weight in (block.in_proj.weight, block.out_proj.weight, block.fc.weight, block.proj.weight):
                torch.mm(self.rows[weight.shape[1]], weight.T, out=self.out[weight.shape[0]])

    def backward(self) -> None:
        """Their input gradients: x = y W."""
        for block in reversed(self.weights.blocks):
            for weight in (block.proj.weight, block.fc.weight, block.out_proj.weight, block.in_proj.weight):
                torch.mm(self.rows[weight.shape[0]], weight, out=self.out[weight.shape[1]])

    def step(self) -> None:
        self.forward()
        self.backward()
