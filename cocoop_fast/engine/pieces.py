"""Any number of images and classes in a bounded amount of memory, with the same gradient.

Only what is saved for backward grows with the rows. Where it does not fit, the first pass over the tree saves nothing,
and backward goes through it again in pieces, each with a forward of its own: first image by image, then shards of
consecutive classes. A shard brings the context rows and the rows above its classes along; what the pieces say about
the context is added up in a fixed order. One more forward is the price: three passes instead of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cocoop_fast.engine.constants import TowerConstants
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.memory import free_memory, parse_bytes
from cocoop_fast.errors import UserError
from cocoop_fast.prompts.tree import ClassTree

# Without a budget: the part of the free memory that activations may take.
_OF_FREE_MEMORY = 0.8

# Without gradients nothing is kept, so images go through in groups of about this many rows: large enough for
# full GEMM speed, small enough that a test batch of 100 images and 1000 classes needs no memory of its own.
ROWS_PER_INFERENCE_PASS = 8192


class Tower(Protocol):
    """What encodes the rows of a tree."""

    constants: TowerConstants

    @property
    def takes_deep_prompts(self) -> bool: ...

    @property
    def kept_bytes(self) -> int:
        """What stays allocated whatever passes come."""

    @property
    def pooled_bytes(self) -> int:
        """The memory of passes that are over, for the next ones."""

    def encode(self, contexts: ContextRows) -> Tensor:
        """To (B, Q, E) features of the leaves, differentiable."""

    def pass_bytes(self, tree: ClassTree, batch: int, *, keeps: bool) -> int:
        """What a pass over B images of this tree, or a part of it, allocates; `keeps`: with its backward."""

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
        pieces = self.pieces(tower, batch, keeps=True)
        largest = _largest_pass(tower, pieces, keeps=True)
        self.bytes = _fixed_bytes(tower, batch) + int(largest / 2 / _share(tower, keeps=True))
        self._known.clear()
        for keeps in (True, False):
            self.pieces(tower, batch, keeps=keeps)

    def _decide(self, tower: Tower, batch: int, keeps: bool) -> Pieces:
        tree = tower.constants.tree
        most = batch if keeps else max(1, min(batch, ROWS_PER_INFERENCE_PASS // tree.rows))
        total = self._total(tower.constants.weights.device)
        if total is None:
            return Pieces(most)
        fixed = _fixed_bytes(tower, batch)
        if keeps and tower.pass_bytes(tree, most, keeps=True) <= total - fixed:
            return Pieces(most)
        share = _share(tower, keeps=keeps)
        left = int(share * (total - fixed))
        if not keeps and tower.pass_bytes(tree, most, keeps=False) <= left:
            return Pieces(most)
        largest = tower.pass_bytes(tree, 1, keeps=keeps)
        if largest <= left:
            return Pieces(min(most, left // largest))
        nodes = len(tree)
        while nodes > 1 and left > 0:
            nodes = max(1, int(nodes * min(0.9, left / largest)))
            pieces = Pieces(1, shard(tree, nodes))
            largest = _largest_pass(tower, pieces, keeps)
            if largest <= left:
                return pieces
        deepest = tree.leaves[tree.depth[tree.leaves].argmax()].reshape(1)
        path = tree.subtree(tree.ancestors(deepest))
        least = fixed + tower.pass_bytes(path, 1, keeps=keeps) / share
        raise UserError(
            f"A memory budget of {total / 1e6:.3g} MB is too small: a batch of {batch} and {tree.n_classes} classes "
            f"needs {ceil(least / 1e4) / 100:.2f} MB at least; give more."
        )

    def _total(self, device: torch.device) -> int | None:
        if self.bytes is not None:
            return self.bytes
        free = free_memory(device)
        return None if free is None else int(free * _OF_FREE_MEMORY)


def _share(tower: Tower, *, keeps: bool) -> float:
    """Of the memory for activations. Where backward goes in pieces, the pass without gradients and that with them are
    there at once: by what they need of an image, both go in about as many pieces."""
    inference, training = (
        tower.pass_bytes(tower.constants.tree, 1, keeps=with_them) for with_them in (False, True)
    )
    return (training if keeps else inference) / (inference + training)


def _fixed_bytes(tower: Tower, batch: int) -> int:
    """Whatever the pieces are: copies of weights; the features of leaves and classes, and the gradients of both."""
    tree, weights = tower.constants.tree, tower.constants.weights
    features = batch * (len(tree.leaves) + tree.n_classes) * weights.projection.weight.shape[1]
    return tower.kept_bytes + 2 * features * weights.dtype.itemsize


def _largest_pass(tower: Tower, pieces: Pieces, keeps: bool) -> int:
    """Of all pieces. A shard that is the largest has the most rows or the most leaves."""
    trees = [part.tree for part in pieces.shards] or [tower.constants.tree]
    largest = {max(trees, key=lambda tree: tree.rows), max(trees, key=lambda tree: len(tree.leaves))}
    return max(tower.pass_bytes(tree, pieces.images, keeps=keeps) for tree in largest)


def encode_in_pieces(tower: Tower, contexts: ContextRows, budget: MemoryBudget) -> Tensor:
    """To features (B, Q, E), within the budget.

    Raises:
        UserError: see :meth:`MemoryBudget.pieces`.
    """
    batch = contexts.batch
    if contexts.requires_grad:
        backward = budget.pieces(tower, batch, keeps=True)
        if backward.images >= batch and not backward.shards:
            return tower.encode(contexts)
        forward = budget.pieces(tower, batch, keeps=False)
        features: Tensor = _InPieces.apply(tower, forward, backward, *contexts.tensors())
        return features
    return _forward(tower, budget.pieces(tower, batch, keeps=False), contexts)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        node: Any, tower: Tower, forward: Pieces, backward: Pieces, *tensors: Tensor | None
    ) -> Tensor:
        contexts = ContextRows.of(tensors)
        node.tower, node.pieces = tower, backward
        device = contexts.shift.device.type
        node.autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        node.save_for_backward(*tensors)
        return _forward(tower, forward, contexts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(node: Any, grad_features: Tensor) -> tuple[Tensor | None, ...]:
        contexts = ContextRows.of(node.saved_tensors)
        totals = ContextRows.of(
            [None if one is None else torch.zeros_like(one) for one in contexts.tensors()]
        )
        for images in node.pieces.of(contexts.batch):
            for tower, leaves in _towers(node.tower, node.pieces):
                own = ContextRows.of(
                    [None if one is None else one.detach() for one in contexts.images(images).tensors()]
                )
                with torch.enable_grad(), node.autocast:  # which backward does not run under
                    inputs = [one.requires_grad_() for one in own.tensors() if one is not None]
                    features = tower.encode(own)
                found = torch.autograd.grad(features, inputs, grad_features[images, leaves])
                there = [one for one in totals.images(images).tensors() if one is not None]
                for total, part in zip(there, found, strict=True):  # views of the totals
                    total += part
        return None, None, None, *totals.tensors()


@torch.no_grad()
def _forward(tower: Tower, pieces: Pieces, contexts: ContextRows) -> Tensor:
    weights = tower.constants.weights
    shape = contexts.batch, len(tower.constants.leaves), weights.projection.weight.shape[1]
    features = torch.empty(shape, dtype=weights.dtype, device=weights.device)
    for images in pieces.of(contexts.batch):
        for part, leaves in _towers(tower, pieces):
            features[images, leaves] = part.encode(contexts.images(images))
    return features


def _towers(tower: Tower, pieces: Pieces) -> Iterator[tuple[Tower, slice]]:
    """A tower for each shard, made when it is needed: its constants are not kept.

    The largest comes first: the towers' memory grows to its size once, and not again and again.
    """
    if not pieces.shards:
        yield tower, slice(None)
    for part in sorted(pieces.shards, key=lambda part: -len(part.tree)):
        yield tower.for_part(tower.constants.part(part.tree)), part.leaves
