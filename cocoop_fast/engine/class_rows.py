"""From the features of the distinct prompts to those of the classes, of which several may have one prompt."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.ops.table import Ops


class ClassRows:
    """Which row each class reads.

    Args:
        row: (n,) int64 on the CPU, of each class; every number below the largest is there.
        device: of the rows.
    """

    def __init__(self, row: Tensor, device: torch.device) -> None:
        self._on_cpu = row
        self.row = row.to(device)

    def __call__(self, features: Tensor, ops: Ops | None) -> Tensor:
        """(B, Q, E) rows to (B, n, E), differentiable. Without operations by torch's indexing, whose gradient sorts."""
        if ops is None:
            return features[:, self.row]
        if features.requires_grad:
            selected: Tensor = _Select.apply(features, self, ops)
            return selected
        return self._select(features, ops)

    @cached_property
    def turns(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The classes in turns, in each no row twice: (c,) classes and (c,) their rows, ascending. In the first turn is
        the first class of each row, in the second the second class of those that have one, and so on."""
        row, classes = self._on_cpu.sort(stable=True)
        turn = torch.arange(len(row)) - torch.searchsorted(row, row)
        chosen = [turn == number for number in range(int(turn.max()) + 1)]
        return tuple((classes[own].to(self.row.device), row[own].to(self.row.device)) for own in chosen)

    def _select(self, rows: Tensor, ops: Ops) -> Tensor:
        out = rows.new_empty(len(rows), len(self.row), rows.shape[2])
        ops.gather_rows(rows, self.row, out)
        return out


class _Select(torch.autograd.Function):
    """grad row = the sum over its classes, in their order."""

    @staticmethod
    def forward(node: Any, features: Tensor, classes: ClassRows, ops: Ops) -> Tensor:
        node.classes, node.ops = classes, ops
        return classes._select(features, ops)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(node: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (first, rows), *others = node.classes.turns
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()  # a gradient may be one number, expanded
        total = grad.new_empty(len(grad), len(rows), grad.shape[2])
        node.ops.gather_rows(grad, first, total)
        for again, rows in others:
            part = grad.new_empty(len(grad), len(rows), grad.shape[2])
            node.ops.gather_rows(grad, again, part)
            node.ops.add_rows(part, rows, total)
        return total, None, None
