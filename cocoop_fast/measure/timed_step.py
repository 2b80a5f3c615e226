"""A step of the engine on this CPU, timed operation by operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from math import ceil, exp, log
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.clip.frozen import Affine, TextWeights, TransformerBlock
from cocoop_fast.engine.constants import compute_constants
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.fused_tower import FusedTower
from cocoop_fast.measure.cost import CountingOps, Operation, Product, TreeCost
from cocoop_fast.measure.timing import seconds_of
from cocoop_fast.methods.cocoop import MetaNet
from cocoop_fast.ops import cpu
from cocoop_fast.ops.head import cosine_cross_entropy
from cocoop_fast.ops.table import Ops
from cocoop_fast.prompts.tree import ClassTree

CACHE_BYTES = 64e6  # weights beyond this are read from memory

Shape: TypeAlias = tuple[int, int, bool]  # inner, columns, backward
# What has a rate of its own: a product's shape and rows, a kind of kernel.
Key: TypeAlias = tuple[Shape, int] | str


def shape_of(product: Product) -> Shape:
    """What decides a product's rate besides its rows."""
    return product.inner, product.columns, product.backward


class ShortTower:
    """Steps over a class tree through a tower with as many layers as do not fit into a cache, and weights of its own.

    So each product finds its weight in memory, as in a step of the whole tower.

    Args:
        like: weights of the whole tower; their shapes alone count.
        tree: the class tree.
        clock: what tells the seconds.
    """

    def __init__(self, like: TextWeights, tree: ClassTree, clock: Callable[[], float]) -> None:
        self.clock, self.ops, weights = clock, TimedOps(clock), _short(like)
        self.width, self.embed_dim = weights.projection.weight.shape
        self.cost = TreeCost(weights, tree, cpu)
        self.meta_net = MetaNet(self.embed_dim, self.width)
        self.ctx = torch.zeros(tree.n_ctx, self.width, requires_grad=True)
        with torch.no_grad():
            self.tower = FusedTower(compute_constants(weights, tree), cast(Ops, self.ops))
        # In the tower it is torch's own, so it is timed apart.
        projection = Affine(weights.projection.weight.T.contiguous(), weights.projection.bias)
        self.projection = self.ops.frozen_linear(projection, packed=False)
        # Of the fastest step and the fastest forward pass.
        self.fastest: dict[bool, tuple[float, list[tuple[Operation, float]]]] = {}

    def run(self, batch: int, *, backward: bool) -> None:
        """A step over B images, or a forward pass alone."""
        constants = self.tower.constants
        image = F.normalize(torch.ones(batch, self.embed_dim))
        label, scale = torch.zeros(batch, dtype=torch.int64), torch.tensor(4.6)
        leaf_rows = torch.ones(batch * len(constants.leaves), self.width)
        leaf_features = torch.ones(len(leaf_rows), self.embed_dim)

        def step() -> None:
            features = self.tower.encode(ContextRows(self.ctx, self.meta_net(image)))
            loss, _ = cosine_cross_entropy(image, constants.classes(features, cpu), scale, label)
            if backward:
                loss.backward()

        self.ops.forget()
        with torch.set_grad_enabled(backward):
            seconds = seconds_of(step, self.clock) - self.ops.noting
        self.projection.forward(leaf_rows, leaf_features)
        if backward:
            self.projection.backward(leaf_features, leaf_rows)
        around = self.cost.around(batch, keeps=backward)
        rest = max(1e-9, seconds - sum(self.ops.seconds)) / len(around)
        if backward not in self.fastest or seconds < self.fastest[backward][0]:
            timed = zip(self.ops.counting.operations, self.ops.seconds, strict=True)
            self.fastest[backward] = seconds, [*timed, *((op, rest) for op in around)]

    def rates(self) -> dict[Key, float]:
        """FLOP/s of products and elements a second of other operations, in the fastest passes."""
        amounts: dict[Key, float] = defaultdict(float)
        seconds: dict[Key, float] = defaultdict(float)
        for _, timed in self.fastest.values():
            for op, spent in timed:
                amounts[_key(op)] += op.flops if isinstance(op, Product) else op.elements
                seconds[_key(op)] += spent
        return {key: amount / seconds[key] for key, amount in amounts.items()}


def _key(op: Operation) -> Key:
    if isinstance(op, Product):
        return shape_of(op), round(exp(round(4 * log(op.rows)) / 4))  # panels differ by a row
    return op.kind


def _short(like: TextWeights) -> TextWeights:
    """Random float32 weights of the same shapes, of as many layers as overflow a cache, three at least."""
    generator, parts = torch.Generator().manual_seed(0), [one.name for one in fields(TransformerBlock)]

    def drawn(like: Affine) -> Affine:
        weight, bias = (torch.randn(one.shape, generator=generator) / 50 for one in (like.weight, like.bias))
        return Affine(weight, bias, like.eps)

    block_bytes = 4 * sum(getattr(like.blocks[0], part).weight.numel() for part in parts)
    blocks = like.blocks[: max(3, ceil(CACHE_BYTES / block_bytes))]
    return replace(
        like,
        token_embedding=torch.ones(1, like.width).expand(like.token_embedding.shape),
        positional_embedding=torch.randn(like.positional_embedding.shape, generator=generator),
        blocks=tuple(
            TransformerBlock(**{part: drawn(getattr(one, part)) for part in parts}) for one in blocks
        ),
        ln_final=drawn(like.ln_final),
        projection=drawn(like.projection),
    )


class TimedOps:
    """The CPU's operations; each call is timed, and noted as what :class:`CountingOps` makes of it."""

    PANEL_ROWS, ROW_PADDING, packed_bytes = cpu.PANEL_ROWS, cpu.ROW_PADDING, staticmethod(cpu.packed_bytes)

    known_arguments = cpu.known_arguments
    record = None  # each operation is timed

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.counting = clock, CountingOps(cpu)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.counting.operations.clear()
        self.seconds: list[float] = []  # of each operation
        self.noting = 0.0  # what the notes took

    def call(
        self, run: Callable[..., None], note: Callable[..., None], *arguments: Any, **options: Any
    ) -> None:
        start = self.clock()
        run(*arguments, **options)
        end = self.clock()
        note(*arguments, **options)
        self.seconds.append(end - start)
        self.noting += self.clock() - end

    def __getattr__(self, name: str) -> Callable[..., None]:
        return partial(self.call, getattr(cpu, name), getattr(self.counting, name))

    def frozen_linear(self, layer: Affine, *, packed: bool) -> _TimedLinear:
        make = (ops.frozen_linear(layer, packed=packed) for ops in (cpu, self.counting))
        return _TimedLinear(self, *make)

    def tree_attention(self, *arguments: Any) -> _Timed:
        return _Timed(self, *(ops.tree_attention(*arguments) for ops in (cpu, self.counting)))


class _Timed:
    """A linear layer or an attention, with its counterpart that notes."""

    def __init__(self, ops: TimedOps, real: Any, counting: Any) -> None:
        self.ops, self.real, self.counting = ops, real, counting

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if name in ("packed_bytes", "workspace_floats"):
            return found
        return partial(self.ops.call, found, getattr(self.counting, name))


class _TimedLinear(_Timed):
    def forward_norm(
        self, x: Tensor, residual: Tensor, out: Tensor, norm: Affine, y: Tensor, mean: Tensor, rstd: Tensor
    ) -> None:
        """In two calls, as it is counted. Kernels of our own add the residual with the product."""
        self.forward(x, out)

        def run(*_: Tensor) -> None:
            cpu.layer_norm_fwd(out, None, None, norm.weight, norm.bias, norm.eps, y, mean, rstd)

        self.ops.call(run, self.ops.counting.layer_norm_fwd, out, residual)
