"""ClassTree: the prefix tree of K prompts, in depth-first order.

CLIP's text transformer is causal, so the hidden state of a token depends only on the tokens before it. Prompts
that begin alike share those rows. A row that no learnable context precedes is a constant of the model; every
other row is one row of work a context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.prompts.layout import PromptLayout


@dataclass(frozen=True, eq=False)
class RowPaths:
    """Root-to-leaf paths. Every row lies on one of them, and one path may share its beginning with another.

    Args:
        rows: (n, P) int64: the rows of each path from the first to its leaf, padded with -1.
        fixed: (n, F) int64: what each path sees before them: 0 for SOS, 1 + c for constant c, padded with -1.
        place: (R,) int64: where in ``rows.flatten()`` each row is found first.
    """

    rows: Tensor
    fixed: Tensor
    place: Tensor

    @classmethod
    def of(cls, rows: Tensor, fixed: Tensor) -> RowPaths:
        flat = rows.flatten()
        place = torch.empty(int(flat.max()) + 1 if len(flat) else 0, dtype=torch.int64)
        places = torch.arange(len(flat)).flip(0)
        present = flat.flip(0) >= 0
        place[flat.flip(0)[present]] = places[present]
        return cls(rows, fixed, place)

    def to(self, device: torch.device) -> RowPaths:
        """The same on a device."""
        return RowPaths(self.rows.to(device), self.fixed.to(device), self.place.to(device))


@dataclass(frozen=True, eq=False)
class ConstantTokens:
    """The prefix tree of the tokens that no context precedes, in depth-first order: constants of the model.

    Args:
        token: (C,) token ids.
        parent: (C,) the token before, -1 for SOS.
    """

    token: Tensor
    parent: Tensor

    def __len__(self) -> int:
        """C, the number of constants besides SOS."""
        return len(self.token)

    @cached_property
    def path(self) -> Tensor:
        """(C, P) int64: the constants from the first down to and including each one, padded with -1."""
        return _paths(self.parent)

    @cached_property
    def depth(self) -> Tensor:
        """(C,) int64: tokens between SOS and the constant. Its position in the prompt is ``1 + depth``."""
        return (self.path >= 0).sum(dim=1) - 1

    @cached_property
    def row_paths(self) -> RowPaths:
        """The paths to those without a child."""
        ends = torch.ones(len(self), dtype=torch.bool)
        ends[self.parent[self.parent >= 0]] = False
        rows = self.path[ends]
        return RowPaths.of(rows, torch.zeros(len(rows), 1, dtype=torch.int64))


class ClassTree:
    """Prefix tree over K prompts.

    The standard shape, which this constructor makes: SOS, M context vectors that all classes share, then the
    class tokens. :meth:`from_layout` makes any other: it has constant tokens before the first learnable one, or
    learnable vectors further down, which are nodes like the tokens.

    Rows of one context: first the `n_ctx` context vectors that directly follow SOS in every prompt, then the
    N nodes. Nodes are in depth-first order with the classes sorted by token sequence, so every subtree is a
    contiguous range: the rows that read node n's key are exactly ``n .. subtree_end[n] - 1``.

    Args:
        tokenized_prompts: integer (K, L): SOS, ``n_ctx`` context placeholders, the class tokens, EOT, padding.
            EOT is the largest id of a row, as in CLIP's own pooling.
        n_ctx: M, the number of context tokens after SOS.

    Attributes (all int64, on the CPU):
        token: (N,) token id of each node, -1 for a context vector.
        slot: (N,) which context vector a node is, -1 for a token. Vector m of class k is ``k * n_slots + m`` if
            the contexts are class-specific, else m. The leading ones are slots 0 .. n_ctx - 1.
        parent: (N,) parent node, -1 for the first after the leading context or after constants.
        depth: (N,) tokens between the leading context and the node. Its position is ``1 + n_ctx + depth``.
        subtree_end: (N,) one past the last node of the subtree.
        above: (N,) the last constant before the node, -1 if there is none.
        eot: (K,) the EOT node of each class. Classes with the same tokens share it.
        constants: the tokens, after SOS, that no context precedes.
        n_slots: M, the context vectors of one prompt.
        class_specific: whether each class has its own.

    Raises:
        UserError: the ids are not a (K, L) integer array, or a prompt has no room for its context.
    """

    def __init__(self, tokenized_prompts: Tensor | np.ndarray, n_ctx: int) -> None:
        ids = np.asarray(
            tokenized_prompts.cpu() if isinstance(tokenized_prompts, Tensor) else tokenized_prompts
        )
        _check(ids, n_ctx)
        symbols = ids.astype(np.int64)
        symbols[:, 1 : 1 + n_ctx] = -1 - np.arange(n_ctx)
        self._build(symbols, n_ctx, class_specific=False)

    @classmethod
    def from_layout(cls, layout: PromptLayout) -> ClassTree:
        """The tree of prompts of any layout."""
        tree = cls.__new__(cls)
        tree._build(layout.symbols.numpy(), layout.n_slots, layout.class_specific)
        return tree

    def _build(self, symbols: np.ndarray, n_slots: int, class_specific: bool) -> None:
        self.n_slots, self.class_specific = n_slots, class_specific
        self.n_classes = len(symbols)
        self.sos = int(symbols[0, 0])
        self.n_ctx = 0 if class_specific else _leading_slots(symbols)
        paths = [tuple(row[1 + self.n_ctx : row.argmax() + 1].tolist()) for row in symbols]
        if class_specific:
            paths = [tuple(s if s >= 0 else s - k * n_slots for s in path) for k, path in enumerate(paths)]
        symbol, parent, depth, eot = _trie(paths)

        constant = np.zeros(len(symbol), dtype=bool)
        if self.n_ctx == 0:  # otherwise every node comes after a context vector
            for node in range(len(symbol)):  # parents precede their children
                constant[node] = symbol[node] >= 0 and (parent[node] < 0 or constant[parent[node]])
        index = np.where(constant, constant.cumsum(), (~constant).cumsum()) - 1  # in either group
        self.constants = ConstantTokens(*_tensors(symbol[constant], _renumber(parent[constant], index)))

        symbol, parent, depth = (column[~constant] for column in (symbol, parent, depth))
        from_constant = (parent >= 0) & constant[parent]
        above = np.where(from_constant, index[parent], -1)
        parent = np.where(from_constant, -1, _renumber(parent, index))
        for node, before in enumerate(parent):
            if before >= 0:
                above[node] = above[before]
        self.token, self.slot = _tensors(
            np.where(symbol < 0, -1, symbol), np.where(symbol < 0, -1 - symbol, -1)
        )
        self.parent, self.depth, self.above = _tensors(parent, depth, above)
        self.subtree_end, self.eot = _tensors(_subtree_ends(parent), index[eot])

    def subtree(self, nodes: Tensor) -> ClassTree:
        """The tree of those classes whose EOT is among some of the nodes. Its context vectors are those of this tree.

        Args:
            nodes: (n,) int64, ascending; with each node also its ancestors.
        """
        part = ClassTree.__new__(ClassTree)
        part.n_slots, part.class_specific = self.n_slots, self.class_specific
        part.n_ctx, part.sos, part.constants = self.n_ctx, self.sos, self.constants
        index = torch.full((len(self) + 1,), -1)  # the last entry serves parent -1
        index[nodes] = torch.arange(len(nodes))
        part.token, part.slot, part.depth, part.above = (
            column[nodes] for column in (self.token, self.slot, self.depth, self.above)
        )
        part.parent = index[self.parent[nodes]]
        (part.subtree_end,) = _tensors(_subtree_ends(part.parent.numpy()))
        eot = index[self.eot]
        part.eot = eot[eot >= 0]
        part.n_classes = len(part.eot)
        return part

    def ancestors(self, nodes: Tensor) -> Tensor:
        """The nodes and all that lie above them, ascending."""
        rows = self.path[nodes]
        return rows[rows >= 0].unique()

    def __len__(self) -> int:
        """N, the number of nodes."""
        return len(self.token)

    @property
    def nbytes(self) -> int:
        """Of its index tensors, those that were asked for included."""
        return sum(one.nbytes for one in vars(self).values() if isinstance(one, Tensor))

    @property
    def is_standard(self) -> bool:
        """Whether all that is learned is one shared context right after SOS."""
        return self.n_ctx == self.n_slots

    @property
    def max_depth(self) -> int:
        """The length of the longest path after the leading context, in tokens (EOT included)."""
        return int(self.depth.max()) + 1

    @property
    def rows(self) -> int:
        """R = n_ctx + N: the rows of one context."""
        return self.n_ctx + len(self)

    @cached_property
    def leaves(self) -> Tensor:
        """(K',) int64: the distinct EOT nodes in ascending order, K' <= K."""
        return self.eot.unique()

    @cached_property
    def leaf_of_class(self) -> Tensor:
        """(K,) int64: the index into :attr:`leaves` of each class."""
        return torch.searchsorted(self.leaves, self.eot)

    @cached_property
    def path(self) -> Tensor:
        """(N, P) int64: the nodes from the topmost down to and including each node, padded with -1."""
        return _paths(self.parent)

    @cached_property
    def row_paths(self) -> RowPaths:
        """The rows and the constants that lead to each leaf."""
        nodes = self.path[self.leaves]
        leading = torch.arange(self.n_ctx).expand(len(nodes), -1)
        rows = torch.cat([leading, torch.where(nodes < 0, -1, nodes + self.n_ctx)], dim=1)
        last, path = self.above[self.leaves], self.constants.path
        fixed = torch.full((len(nodes), 1 + path.shape[1]), -1)
        fixed[:, 0] = 0
        fixed[last >= 0, 1:] = torch.where(path < 0, -1, 1 + path)[last[last >= 0]]
        return RowPaths.of(rows, fixed)

    def __repr__(self) -> str:
        return (
            f"ClassTree(classes={self.n_classes}, n_ctx={self.n_ctx}, nodes={len(self)}, "
            f"leaves={len(self.leaves)}, max_depth={self.max_depth})"
        )


def _leading_slots(symbols: np.ndarray) -> int:
    """How many context vectors directly follow SOS in every prompt. (Slots are in the same order in all.)"""
    leading = (symbols[:, 1:] < 0).all(axis=0)
    return int(leading.argmin())


def _check(ids: np.ndarray, n_ctx: int) -> None:
    if ids.ndim != 2 or ids.shape[0] == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"`tokenized_prompts` must be a (K, L) array of integer token ids with K >= 1, got {ids.dtype} "
            f"of shape {tuple(ids.shape)}; pass the output of a CLIP tokenizer."
        )
    if not isinstance(n_ctx, (int, np.integer)) or n_ctx < 1:
        raise UserError(f"`n_ctx` must be a positive integer, got {n_ctx!r}.")
    if (ids[:, 0] != ids[0, 0]).any():
        raise UserError("`tokenized_prompts` must all begin with the same start-of-text token.")
    ends = ids.argmax(axis=1)
    if (ends <= n_ctx).any():
        k = int((ends <= n_ctx).argmax())
        raise UserError(
            f"Prompt {k} ends at position {int(ends[k])}, inside its {n_ctx} context tokens; tokenize each "
            "prompt with a placeholder for every context token."
        )


def _trie(paths: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Symbol, parent and depth of each node of the prefix tree, depth first, and the last node of each path."""
    symbol: list[int] = []
    parent: list[int] = []
    depth: list[int] = []
    ends = np.empty(len(paths), dtype=np.int64)
    open_nodes: list[int] = []  # the path from the root to the last node made
    previous: tuple[int, ...] = ()
    for k in sorted(range(len(paths)), key=paths.__getitem__):
        path = paths[k]
        shared = _common_prefix(previous, path)
        del open_nodes[shared:]
        for level in range(shared, len(path)):
            parent.append(open_nodes[-1] if open_nodes else -1)
            open_nodes.append(len(symbol))
            symbol.append(path[level])
            depth.append(level)
        ends[k] = open_nodes[-1]
        previous = path
    return np.asarray(symbol), np.asarray(parent), np.asarray(depth), ends


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


def _renumber(parent: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.where(parent >= 0, index[parent], -1)


def _subtree_ends(parent: np.ndarray) -> np.ndarray:
    """One past each node's last descendant."""
    ends = np.arange(1, len(parent) + 1)
    for node in range(len(parent) - 1, -1, -1):
        if parent[node] >= 0:
            ends[parent[node]] = max(ends[parent[node]], ends[node])
    return ends


def _paths(parent: Tensor) -> Tensor:
    """(N, P) int64: the nodes from the topmost down to and including each node, padded with -1."""
    paths: list[list[int]] = []
    for node, before in enumerate(parent.tolist()):  # parents precede their children
        paths.append([*(paths[before] if before >= 0 else ()), node])
    longest = max(map(len, paths), default=0)
    padded = [path + [-1] * (longest - len(path)) for path in paths]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(paths), longest)


def _tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array.astype(np.int64)) for array in arrays)
