"""Any number of images and classes in a bounded amount of memory, with the same gradient.

Only what is saved for backward grows with the rows. Where it does not fit, the first pass over the tree saves nothing,
and backward goes through it again in pieces, each with a forward of its own: first image by image, then shards of
consecutive classes. A shard brings the context rows and the rows above its classes along; what the pieces say about
the context is added up in a fixed order. One more forward is the price: three passes instead of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cocoop_fast.engine.constants import TowerConstants, current_autocast
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.engine.memory import PassSize, free_memory, parse_bytes
from cocoop_fast.errors import UserError
from cocoop_fast.ops.table import Ops
from cocoop_fast.prompts.tree import ClassTree

# Without a budget: the part of the free memory that activations may take.
_OF_FREE_MEMORY = 0.8

# Without gradients nothing is kept, so images go through in groups of about this many rows: large enough for
# full GEMM speed, small enough that a test batch of 100 images and 1000 classes needs no memory of its own. A GPU has more
# memory, and each group costs its host some hundred launches, about a millisecond.
ROWS_PER_INFERENCE_PASS = {"cpu": 8192, "cuda": 65536}


class Tower(Protocol):
    """What encodes the rows of a tree."""

    constants: TowerConstants

    @property
    def ops(self) -> Ops | None:
        """What it computes by; None: by torch alone."""

    @property
    def kept_bytes(self) -> int:
        """What stays allocated whatever passes come."""

    @property
    def pooled_bytes(self) -> int:
        """The memory of passes that are over, for the next ones."""

    def encode(self, contexts: ContextRows) -> Tensor:
        """To (B, Q, E) features of the leaves, differentiable."""

    def pass_size(self, trees: Sequence[ClassTree], batch: int, *, keeps: bool) -> PassSize:
        """What passes over B images allocate that go through this tree or parts of it, one after the other.

        Args:
            trees: of each pass.
            batch: B.
            keeps: each is followed by its backward.
        """

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

    def in_order(self) -> Sequence[Shard | None]:
        """The shards, None for the whole tree. The largest comes first: the towers' memory grows to its size once, and not
        again and again."""
        return sorted(self.shards, key=lambda shard: -len(shard.tree)) or (None,)


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
    return tuple(
        Shard(tree.subtree(_down_to(tree, leaves[part.start], leaves[part.stop - 1])), part) for part in parts
    )


def _down_to(tree: ClassTree, first: int, last: int) -> Tensor:
    """The paths to consecutive leaves: that to the first, and every node from there to the last."""
    path = [first]
    while (node := int(tree.parent[path[-1]])) >= 0:
        path.append(node)
    return torch.cat([torch.tensor(path[::-1]), torch.arange(first + 1, last + 1)])


class MemoryBudget:
    """Decides in how many pieces a batch goes through a tree.

    Args:
        budget: bytes, or text like "256MB", for all that a step allocates above the loaded model, the engine's own
            copy of the weights included. None: most of what is free when a batch size is first met.
    """

    def __init__(self, budget: int | str | None) -> None:
        self.bytes = None if budget is None else parse_bytes(budget)
        self._forget()

    def _forget(self) -> None:
        self._known: WeakKeyDictionary[ClassTree, dict[tuple[int, bool], Pieces]] = WeakKeyDictionary()
        self._holds: WeakKeyDictionary[ClassTree, dict[int, bool]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what is known is of trees that are not copied along."""
        return {"bytes": self.bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bytes = state["bytes"]
        self._forget()

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

    def holds(self, tower: Tower, batch: int) -> bool:
        """Whether a batch fits undivided, with all that is kept for backward. Then so does every part of the tree, and nobody
        has to find out again, which takes longer than to make the part.

        Args:
            tower: whose tree it is.
            batch: B.
        """
        known = self._holds.setdefault(tower.constants.tree, {})
        if batch not in known:
            total = self._total(tower.constants.weights.device)
            known[batch] = total is None or _whole_bytes(tower, batch) <= total
        return known[batch]

    def shards(self, tree: ClassTree) -> bool:
        """Whether a batch has gone through this tree in shards of its classes."""
        return any(pieces.shards for pieces in self._known.get(tree, {}).values())

    def step_bytes(self, tower: Tower, batch: int) -> int:
        """What a training step of B images allocates, whole or in pieces; from the contexts to their gradient.

        Raises:
            UserError: see :meth:`pieces`.
        """
        backward = self.pieces(tower, batch, keeps=True)
        training = _size(tower, backward, keeps=True)
        if backward.images >= batch and not backward.shards:
            return training.total + _fixed_bytes(tower, batch)
        forward = self.pieces(tower, batch, keeps=False)
        inference = _size(tower, forward, keeps=False)
        whole = passing = 0  # constants of the whole tree stay, those of a shard go with it
        for pieces, size in ((forward, inference), (backward, training)):
            if pieces.shards:  # their constants are made from rows that go through a LayerNorm first
                passing = max(passing, size.passing + size.constants, size.constants * 5 // 4)
            else:
                whole, passing = size.constants, max(passing, size.passing)
        return _fixed_bytes(tower, batch) + training.pooled + inference.pooled + whole + passing

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
        largest = _size(tower, pieces, keeps=True)
        self.bytes = _fixed_bytes(tower, batch) + int(largest.total / 2 / _share(tower, keeps=True))
        self._forget()
        for keeps in (True, False):
            self.pieces(tower, batch, keeps=keeps)

    def _decide(self, tower: Tower, batch: int, keeps: bool) -> Pieces:
        tree = tower.constants.tree
        rows = ROWS_PER_INFERENCE_PASS[tower.constants.weights.device.type]
        most = batch if keeps else max(1, min(batch, rows // tree.rows))
        total = self._total(tower.constants.weights.device)
        if total is None or (keeps and self.holds(tower, batch)):
            return Pieces(most)
        fixed = _fixed_bytes(tower, batch)
        share = _share(tower, keeps=keeps)
        left = int(share * (total - fixed))
        if not keeps and tower.pass_size([tree], most, keeps=False).total <= left:
            return Pieces(most)
        of_image = tower.pass_size([tree], 1, keeps=keeps)
        if of_image.total <= left:
            return Pieces(min(most, left // of_image.total))
        if keeps and share == 1 and not self.pieces(tower, batch, keeps=False).shards:
            left -= of_image.constants  # from the forward pass; otherwise they are in its share
        nodes, largest = len(tree), of_image.total
        while nodes > 1 and left > 0:
            nodes = max(1, int(nodes * min(0.9, left / largest)))
            pieces = Pieces(1, shard(tree, nodes))
            largest = _size(tower, pieces, keeps=keeps).total
            if largest <= left:
                return pieces
        smallest = _size(tower, Pieces(1, shard(tree, 1)), keeps=keeps)
        least = fixed + smallest.total / share
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
    """Of the memory for activations. Where backward goes in pieces and the memory of a pass waits for the next one, that
    of the pass without gradients and of that with them are there at once: by what they need of an image, both go in about
    as many pieces."""
    inference, training = (
        tower.pass_size([tower.constants.tree], 1, keeps=with_them) for with_them in (False, True)
    )
    if not training.pooled:
        return 1.0
    return (training if keeps else inference).total / (inference.total + training.total)


def _fixed_bytes(tower: Tower, batch: int) -> int:
    """Whatever the pieces are: copies of weights; in backward the features of the classes and their gradient, and that of
    the leaves, in whose place the leaves' features were."""
    tree, weights = tower.constants.tree, tower.constants.weights
    features = 2 * tree.n_classes + len(tree.leaves)
    # Where the tower computes in copies, the features are cast to the model's own float32 as well.
    itemsize = weights.dtype.itemsize + (4 if weights.copied_bytes else 0)
    kept = tower.kept_bytes + weights.copied_bytes
    return kept + batch * features * weights.projection.weight.shape[1] * itemsize


def _whole_bytes(tower: Tower, batch: int) -> int:
    """Of a step that goes through the whole tree at once."""
    return tower.pass_size([tower.constants.tree], batch, keeps=True).total + _fixed_bytes(tower, batch)


def _size(tower: Tower, pieces: Pieces, *, keeps: bool) -> PassSize:
    """Of all pieces, which use the same memory in turn."""
    trees = [part.tree for part in pieces.shards]
    if not trees:
        return tower.pass_size([tower.constants.tree], pieces.images, keeps=keeps)
    # A shard that is the largest in some way has the most rows, leaves or places on its paths.
    largest = {
        max(trees, key=lambda tree: tree.rows),
        max(trees, key=lambda tree: len(tree.leaves)),
        max(trees, key=lambda tree: tree.rows * tree.max_depth),
    }
    size = tower.pass_size(list(largest), pieces.images, keeps=keeps)
    on_cpu = tower.constants.weights.device.type == "cpu"  # where the trees are
    return size._replace(pooled=size.pooled + on_cpu * sum(tree.nbytes for tree in trees))


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
        node.tower, node.pieces, node.versions = tower, backward, tower.constants.weights.versions()
        node.autocast = current_autocast(contexts.shift.device)
        node.save_for_backward(*tensors)
        return _forward(tower, forward, contexts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(node: Any, grad_features: Tensor) -> tuple[Tensor | None, ...]:
        node.tower.constants.weights.check_unchanged(node.versions)
        contexts = ContextRows.of(node.saved_tensors)
        totals = ContextRows.of(
            [None if one is None else torch.zeros_like(one) for one in contexts.tensors()]
        )
        for images in node.pieces.of(contexts.batch):
            there = [one for one in totals.images(images).tensors() if one is not None]
            for shard in node.pieces.in_order():
                with node.autocast:
                    found = _gradients(node.tower, shard, contexts.images(images), grad_features[images])
                for total, part in zip(there, found, strict=True):  # views of the totals
                    total += part
        return None, None, None, *totals.tensors()


@torch.enable_grad()
def _gradients(
    tower: Tower, shard: Shard | None, contexts: ContextRows, grad_features: Tensor
) -> tuple[Tensor, ...]:
    """Of the contexts, through one piece. Nothing of it outlives the call: the next piece has the memory for itself."""
    own = ContextRows.of([None if one is None else one.detach() for one in contexts.tensors()])
    inputs = [one.requires_grad_() for one in own.tensors() if one is not None]
    part, leaves = _part(tower, shard)
    return torch.autograd.grad(part.encode(own), inputs, grad_features[:, leaves])


@torch.no_grad()
def _forward(tower: Tower, pieces: Pieces, contexts: ContextRows) -> Tensor:
    weights = tower.constants.weights
    shape = contexts.batch, len(tower.constants.leaves), weights.projection.weight.shape[1]
    features = torch.empty(shape, dtype=weights.dtype, device=weights.device)
    for images in pieces.of(contexts.batch):
        for shard in pieces.in_order():
            part, leaves = _part(tower, shard)
            features[images, leaves] = part.encode(contexts.images(images))
            del part  # the next one has the memory for itself
    return features


def _part(tower: Tower, shard: Shard | None) -> tuple[Tower, slice]:
    """The tower of a shard, made when it is needed: its constants are not kept."""
    if shard is None:
        return tower, slice(None)
    return tower.for_part(tower.constants.part(shard.tree)), shard.leaves
