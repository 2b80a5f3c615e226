"""Tree attention on the operations' interface for GPUs: random calls of every kind, and the twin's results for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comparison import assert_close
from kernel_testing import POISON
from torch import Tensor

from cocoop_fast.ops.tree_attention import tree_attention_ref
from cocoop_fast.prompts.tree import ClassTree

EOT = 99

# What attention is asked for in the layers of a text tower.
MODES: dict[str, dict[str, bool]] = {
    "middle layer": {},
    "last layer": {"queries": True},
    "first layer": {"layer_zero": True},
    "only layer": {"layer_zero": True, "queries": True},
}

# The largest error relative to the largest magnitude, against float64, the rounding of the result included.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def tree_of(names: list[list[int]], n_ctx: int = 4) -> ClassTree:
    """The tree of class names given as lists of small token ids."""
    ids = torch.zeros(len(names), 2 + n_ctx + max(map(len, names)), dtype=torch.int64)
    for row, name in zip(ids, names, strict=True):
        row[1 + n_ctx : 1 + n_ctx + len(name)] = torch.tensor(name, dtype=torch.int64)
        row[1 + n_ctx + len(name)] = EOT
    return ClassTree(ids, n_ctx)


def random_names(count: int, vocabulary: int, longest: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [
        generator.integers(1, 1 + vocabulary, generator.integers(1, longest + 1)).tolist()
        for _ in range(count)
    ]


INPUTS = ("q", "k", "v", "sos_k", "sos_v", "heads")


def grouped(arguments: dict[str, Any]) -> dict[str, Any]:
    """Named arguments of a call, those that attention reads as its `inputs`."""
    others = {name: value for name, value in arguments.items() if name not in INPUTS}
    return {"inputs": tuple(arguments[name] for name in INPUTS), **others}


class Fenced:
    """A tensor of this shape among poison, its rows where 16 bytes can be loaded at a time.

    Args:
        behind: numbers of poison behind each row.
    """

    def __init__(
        self,
        *shape: int,
        dtype: torch.dtype,
        device: torch.device | str,
        poison: float,
        behind: int = 16,
    ) -> None:
        self.poison = torch.tensor(poison, dtype=torch.float64).to(dtype)
        size = [*(extent + 2 for extent in shape[:-1]), 16 + shape[-1] + behind]
        self.buffer = self.poison.repeat(size).to(device)
        self.inside = (*[slice(1, extent + 1) for extent in shape[:-1]], slice(16, shape[-1] + 16))
        self.tensor = self.buffer[self.inside]

    def check(self) -> None:
        """Nothing outside was written, and everything inside was."""
        inside = self.tensor.cpu()
        assert not bool((inside == self.poison).any()), "a part of the result was not written"
        outside = self.buffer.cpu().clone()
        outside[self.inside] = self.poison
        assert bool((outside == self.poison).all()), "memory outside the result was written"


class AttentionCase:
    """One call: its inputs have NaN around them, its results poison.

    Args:
        kernels: a table with the class TreeAttention.
        queries: the leaves are the query rows, as in the last layer.
        layer_zero: the nodes' rows are the same for all images, and only the context's gradients are wanted.
        apart: dq, dk and dv are written to buffers of their own, with other strides, instead of beside each other.
    """

    def __init__(
        self,
        kernels: Any,
        tree: ClassTree,
        batch: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        queries: bool = False,
        layer_zero: bool = False,
        apart: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tree, self.heads, self.head_size, self.d = tree, heads, head_size, heads * head_size
        self.batch, self.m, self.dtype, self.device = batch, tree.n_ctx, dtype, device
        self.queries, self.layer_zero, self.apart = tree.leaves if queries else None, layer_zero, apart
        self.n_queries = len(tree.leaves) if queries else tree.rows

        def random(*shape: int) -> Tensor:
            fenced = Fenced(*shape, dtype=dtype, device=device, poison=torch.nan)
            fenced.tensor.copy_(torch.randn(*shape, generator=generator))
            return fenced.tensor

        if layer_zero:
            context, nodes = random(batch, self.m, 3 * self.d), random(len(tree), 3 * self.d)
            self.parts = list(zip(context.split(self.d, -1), nodes.split(self.d, -1), strict=True))
        else:  # views into what one GEMM writes
            self.parts = list(random(batch, tree.rows, 3 * self.d).split(self.d, -1))
        self.q, self.k, self.v = self.parts
        if queries:
            self.q = random(batch, self.n_queries, self.d)
        self.sos_k, self.sos_v = random(self.d), random(self.d)
        self.grad_o = random(batch, self.n_queries, self.d)
        self.attention = kernels.TreeAttention(tree, self.queries, device)
        self.inputs = (self.q, self.k, self.v, self.sos_k, self.sos_v, heads)

    def result(self, rows: int, columns: int, behind: int = 16) -> Fenced:
        kind = {"dtype": self.dtype, "device": self.device}
        return Fenced(self.batch, rows, columns, **kind, poison=POISON, behind=behind)

    def forward(self) -> Tensor:
        o = self.result(self.n_queries, self.d)
        self.attention.forward(self.inputs, o.tensor)
        o.check()
        return o.tensor

    def backward(self) -> list[Tensor | None]:
        """dq (or None), dk, dv."""
        rows = self.m if self.layer_zero else self.tree.rows
        count = 2 if self.queries is not None else 3
        if self.apart:
            results = [self.result(rows, self.d, behind) for behind in (16, 48, 80)[:count]]
        else:  # views of one buffer
            results = [self.result(rows, count * self.d)]
        *dq, dk, dv = (part for one in results for part in one.tensor.split(self.d, -1))
        if self.queries is not None and not self.layer_zero:
            results.append(self.result(self.n_queries, self.d))
            dq = [results[-1].tensor]
        floats = self.attention.workspace_floats(self.batch, self.heads, self.head_size)
        workspace = Fenced(floats, dtype=torch.float32, device=self.device, poison=torch.nan)
        gradients = [dq[0] if dq else None, dk, dv]
        self.attention.backward(
            self.grad_o, self.inputs, *gradients, workspace.tensor, context_only=self.layer_zero
        )
        for one in results:
            one.check()
        outside = workspace.buffer.cpu().clone()
        outside[workspace.inside] = torch.nan
        assert bool(outside.isnan().all()), "memory outside the workspace was written"
        return gradients

    def expected(self) -> list[Tensor | None]:
        """o, dq, dk, dv of the twin in float64."""

        def whole(part: Tensor | tuple[Tensor, Tensor]) -> Tensor:
            if not isinstance(part, Tensor):
                context, nodes = part
                part = torch.cat([context, nodes.expand(self.batch, -1, -1)], dim=1)
            return part.cpu().double().unflatten(-1, (self.heads, -1)).requires_grad_()

        q, k, v = (whole(part) for part in (self.q, self.k, self.v))
        sos_k, sos_v = (sos.cpu().double().view(self.heads, -1) for sos in (self.sos_k, self.sos_v))
        o = tree_attention_ref(q, k, v, sos_k, sos_v, self.tree, self.queries)
        o.backward(self.grad_o.cpu().double().view_as(o))
        assert q.grad is not None and k.grad is not None and v.grad is not None
        dq, dk, dv = (x.grad.flatten(-2) for x in (q, k, v))
        if not self.layer_zero:
            return [o.flatten(-2), dq, dk, dv]
        context = slice(0, self.m)
        return [
            o.flatten(-2),
            None if self.queries is not None else dq[:, context],
            dk[:, context],
            dv[:, context],
        ]

    def check(self) -> None:
        results = [self.forward(), *self.backward()]
        for name, actual, expected in zip(("o", "dq", "dk", "dv"), results, self.expected(), strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None and expected is not None:
                assert_close(actual.cpu(), expected, TOLERANCES[self.dtype], name)

    def results(self) -> list[Tensor]:
        """Copies of all that is written."""
        return [self.forward().clone(), *(x.clone() for x in self.backward() if x is not None)]
