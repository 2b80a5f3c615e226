"""Any number of images and classes in a bounded amount of memory, with the same gradient.

Only what is saved for backward grows with the rows. Where it does not fit, the first pass over the tree saves nothing,
and backward goes through it again in pieces, each with a forward of its own: first image by image, then shards of
consecutive classes. A shard brings the context rows and the rows above its classes along; what the pieces say about
the context is added up in a fixed order. One more forward is the price: three passes instead of two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cocoop_fast.engine.constants import TowerConstants
from cocoop_fast.engine.cpu_tower import CpuTower
from cocoop_fast.engine.free_memory import free_memory
from cocoop_fast.engine.torch_tower import TorchTower
from cocoop_fast.errors import UserError
from cocoop_fast.measure import buffers
from cocoop_fast.measure.sizes import RowCounts, TowerSizes
from cocoop_fast.prompts.tree import ClassTree

# Of the memory that activations may take, what the pass without gradients gets: it keeps one layer, backward all.
_INFERENCE_SHARE = 1 / 8

# Without a budget: the part of the free memory that activations may take.
_OF_FREE_MEMORY = 0.8

# Without gradients nothing is kept, so images go through in groups of about this many rows: large enough for
# full GEMM speed, small enough that a test batch of 100 images and 1000 classes needs no memory of its own.
ROWS_PER_INFERENCE_PASS = 8192


class Tower(Protocol):
    """What encodes the rows of a tree."""

    constants: TowerConstants

    def encode(self, ctx: Tensor) -> Tensor:
        """(B, S, d) contexts to (B, Q, E) features of the leaves."""

    def for_part(self, constants: TowerConstants) -> Tower:
        """A tower of the same weights for another tree."""

    def release(self) -> None:
        """Give back the memory of passes that are over."""


@dataclass(frozen=True)
class Shard:
    """Consecutive leaves of a tree, and all rows above them."""

    tree: ClassTree
    leaves: slice  # among those of the whole tree


@dataclass(frozen=True)
class Pieces:
    """How a batch goes through a tree: so many images at a time, and of each the shards in turn."""

    images: int
    shards: tuple[Shard, ...] = ()  # none: the whole tree

    def of(self, batch: int) -> Iterator[slice]:
        """The groups of images."""
        return (slice(first, min(first + self.images, batch)) for first in range(0, batch, self.images))


def parse_bytes(budget: int | str) -> int:
    """ "256MB", "1.5 GiB" or a number of bytes.

    Raises:
        UserError: neither.
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", str(budget), flags=re.IGNORECASE)
    size = 0.0
    if found is not None:
        size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    if size < 1:
        raise UserError(
            f"The memory budget '{budget}' is not an amount of memory; give bytes, or say 256MB or 1.5GiB."
        )
    return int(size)


def shard(tree: ClassTree, max_nodes: int) -> tuple[Shard, ...]:
    """Cut a tree into shards of consecutive leaves, of at most so many nodes each if one leaf's path allows.

    Nodes are in depth-first order, so those between two leaves are new on the path to the second.
    """
    leaves = tree.leaves.tolist()
    bounds, nodes, last = [0], 0, -1
    for i, leaf in enumerate(leaves):
        new = leaf - last
        if nodes + new > max_nodes and i > bounds[-1]:
            bounds.append(i)
            nodes = new = int(tree.depth[leaf]) + 1  # the rows above the first leaf are computed again
            nodes -= new
        nodes, last = nodes + new, leaf
    bounds.append(len(leaves))
    parts = (slice(*pair) for pair in pairwise(bounds))
    return tuple(Shard(tree.subtree(tree.ancestors(tree.leaves[part])), part) for part in parts)


class MemoryBudget:
    """Decides in how many pieces a batch goes through a tree.

    Args:
        budget: bytes, or text like "256MB", for all that a step allocates above the loaded model, the engine's own
            copy of the weights included. None: most of what is free when a batch size is first met.
    """

    def __init__(self, budget: int | str | None) -> None:
        self.bytes = None if budget is None else parse_bytes(budget)
        self._known: WeakKeyDictionary[ClassTree, dict[tuple[int, bool], Pieces]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what is known is of trees that are not copied along."""
        return {"bytes": self.bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bytes = state["bytes"]
        self._known = WeakKeyDictionary()

    def pieces(self, tower: Tower, batch: int, *, keeps: bool) -> Pieces:
        """The largest pieces that fit; images are parted before classes.

        Args:
            tower: whose tree it is.
            batch: B.
            keeps: whether activations are kept for backward.

        Raises:
            UserError: not even one class of one image fits the budget.
        """
        known = self._known.setdefault(tower.constants.tree, {})
        if (batch, keeps) not in known:
            known[batch, keeps] = self._decide(tower, batch, keeps)
        return known[batch, keeps]

    def lower(self, tower: Tower, batch: int) -> None:
        """After a step ran out of memory: from now on pieces of half the size that it had. What the tower kept for
        larger ones is given back.

        Args:
            tower: whose tree it is.
            batch: B.

        Raises:
            UserError: not even one class of one image fits that.
        """
        tower.release()
        tree, use = tower.constants.tree, _MemoryUse(tower, keeps=True)
        pieces = self.pieces(tower, batch, keeps=True)
        largest = max((use.of(part.tree, 1) for part in pieces.shards), default=use.of(tree, pieces.images))
        self.bytes = use.fixed(tree, batch) + largest // 2
        self._known.clear()
        for keeps in (True, False):
            self.pieces(tower, batch, keeps=keeps)

    def _decide(self, tower: Tower, batch: int, keeps: bool) -> Pieces:
        tree, use = tower.constants.tree, _MemoryUse(tower, keeps)
        most = batch if keeps else max(1, min(batch, ROWS_PER_INFERENCE_PASS // tree.rows))
        total = self._total(tower.constants.weights.device)
        if total is None:
            return Pieces(most)
        share = 1 if keeps else _INFERENCE_SHARE
        left = int(share * (total - use.fixed(tree, batch)))
        if use.of(tree, most) <= left:
            return Pieces(most)
        largest = use.of(tree, 1)
        if largest <= left:
            return Pieces(min(most, left // largest))
        nodes = len(tree)
        while nodes > 1 and left > 0:
            nodes = max(1, int(nodes * min(0.9, left / largest)))
            shards = shard(tree, nodes)
            largest = max(use.of(part.tree, 1) for part in shards)
            if largest <= left:
                return Pieces(1, shards)
        deepest = tree.leaves[tree.depth[tree.leaves].argmax()].reshape(1)
        least = use.fixed(tree, batch) + use.of(tree.subtree(tree.ancestors(deepest)), 1) / share
        raise UserError(
            f"A memory budget of {total / 1e6:.3g} MB is too small: a batch of {batch} and {tree.n_classes} classes "
            f"needs {ceil(least / 1e4) / 100:.2f} MB at least; give more."
        )

    def _total(self, device: torch.device) -> int | None:
        if self.bytes is not None:
            return self.bytes
        free = free_memory(device)
        return None if free is None else int(free * _OF_FREE_MEMORY)


class _MemoryUse:
    """Bytes that passes over trees of the same weights allocate."""

    # What autograd keeps of the torch operations is more than what the engines keep, by about this factor:
    # "class tree, torch operations" against "C++ engine" in docs/performance.md.
    AUTOGRAD = 5

    def __init__(self, tower: Tower, keeps: bool) -> None:
        weights = tower.constants.weights
        self.sizes, self.keeps = TowerSizes.of(weights), keeps
        self.item = weights.dtype.itemsize
        self.by_autograd, self.packed = isinstance(tower, TorchTower), isinstance(tower, CpuTower)

    def fixed(self, tree: ClassTree, batch: int) -> int:
        """Whatever the pieces are."""
        features = buffers.head_bytes(self.sizes, RowCounts.of(tree), batch, self.item)
        return features + (buffers.packed_bytes(self.sizes) if self.packed else 0)

    def of(self, tree: ClassTree, batch: int) -> int:
        """Of one pass over `batch` images of a tree."""
        counts = RowCounts.of(tree)
        scratch = buffers.scratch_bytes(self.sizes, counts, batch, self.item, keeps=self.keeps)
        saved = buffers.saved_bytes(self.sizes, counts, batch, self.item) if self.keeps else 0
        use = scratch + saved * (self.AUTOGRAD if self.by_autograd else 1)
        return use + buffers.constant_bytes(self.sizes, counts, self.item)


def encode_in_pieces(tower: Tower, rows: Sequence[Tensor], budget: MemoryBudget) -> Tensor:
    """A context (B, S, d), and its deep prompts if there are any, to features (B, Q, E), within the budget.

    Raises:
        UserError: see :meth:`MemoryBudget.pieces`.
    """
    batch = len(rows[0])
    if torch.is_grad_enabled() and any(one.requires_grad for one in rows):
        backward = budget.pieces(tower, batch, keeps=True)
        if backward.images >= batch and not backward.shards:
            return _encode(tower, rows)
        features: Tensor = _InPieces.apply(tower, budget.pieces(tower, batch, keeps=False), backward, *rows)
        return features
    return _forward(tower, budget.pieces(tower, batch, keeps=False), rows)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(node: Any, tower: Tower, forward: Pieces, backward: Pieces, *rows: Tensor) -> Tensor:
        node.tower, node.pieces = tower, backward
        device = rows[0].device.type
        node.autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        node.save_for_backward(*rows)
        return _forward(tower, forward, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(node: Any, grad_features: Tensor) -> tuple[Tensor | None, ...]:
        rows = node.saved_tensors
        grads = [torch.zeros_like(one) for one in rows]
        for images in node.pieces.of(len(rows[0])):
            for tower, leaves in _towers(node.tower, node.pieces):
                own = [one[images].detach().requires_grad_() for one in rows]
                with torch.enable_grad(), node.autocast:  # which backward does not run under
                    features = _encode(tower, own)
                for grad, part in zip(
                    grads, torch.autograd.grad(features, own, grad_features[images, leaves]), strict=True
                ):
                    grad[images] += part
        return None, None, None, *grads


@torch.no_grad()
def _forward(tower: Tower, pieces: Pieces, rows: Sequence[Tensor]) -> Tensor:
    batch, weights = len(rows[0]), tower.constants.weights
    shape = batch, len(tower.constants.leaves), weights.projection.weight.shape[1]
    features = torch.empty(shape, dtype=weights.dtype, device=weights.device)
    for images in pieces.of(batch):
        own = [one[images] for one in rows]
        for part, leaves in _towers(tower, pieces):
            features[images, leaves] = _encode(part, own)
    return features


def _towers(tower: Tower, pieces: Pieces) -> Iterator[tuple[Tower, slice]]:
    """A tower for each shard, made when it is needed: its constants are not kept.

    The largest comes first: the towers' memory grows to its size once, and not again and again.
    """
    if not pieces.shards:
        yield tower, slice(None)
    for part in sorted(pieces.shards, key=lambda part: -len(part.tree)):
        yield tower.for_part(tower.constants.part(part.tree)), part.leaves


def _encode(tower: Tower, rows: Sequence[Tensor]) -> Tensor:
    ctx, *deep = rows
    if not deep:
        return tower.encode(ctx)
    assert isinstance(tower, TorchTower), "deep prompts are computed by torch"
    return tower.encode(ctx, deep)
