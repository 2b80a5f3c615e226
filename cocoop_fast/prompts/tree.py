"""ClassTree: the prefix tree of K prompts, in depth-first order.

CLIP's text transformer is causal, so the hidden state of a token depends only on the tokens before it. Prompts
that begin alike share those rows. A row that no learnable context precedes is a constant of the model; every
other row is one row of work a context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    import numpy as np

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
        place = torch.zeros(int(flat.max()) + 1 if len(flat) else 0, dtype=torch.int64)
        present = (flat >= 0).nonzero()[:, 0]
        place.scatter_reduce_(0, flat[present], present, "amin", include_self=False)
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
        above: (N,) the last constant before the node, -1 if there is none.
        eot: (K,) the EOT node of each class. Classes with the same tokens share it.
        constants: the tokens, after SOS, that no context precedes.
        n_slots: M, the context vectors of one prompt.
        class_specific: whether each class has its own.

    Raises:
        UserError: the ids are not a (K, L) integer array, or a prompt has no room for its context.
    """

    def __init__(self, tokenized_prompts: Tensor | np.ndarray, n_ctx: int) -> None:
        ids = torch.as_tensor(tokenized_prompts).cpu()
        _check(ids, n_ctx)
        symbols = ids.long().clone()
        symbols[:, 1 : 1 + n_ctx] = -1 - torch.arange(n_ctx)
        self._build(symbols, n_ctx, class_specific=False)

    @classmethod
    def from_layout(cls, layout: PromptLayout) -> ClassTree:
        """The tree of prompts of any layout."""
        tree = cls.__new__(cls)
        tree._build(layout.symbols, layout.n_slots, layout.class_specific)
        return tree

    def _build(self, symbols: Tensor, n_slots: int, class_specific: bool) -> None:
        self.n_slots, self.class_specific = n_slots, class_specific
        self.n_classes = len(symbols)
        self.sos = int(symbols[0, 0])
        self.n_ctx = 0 if class_specific else _leading_slots(symbols)
        if class_specific:
            classes = torch.arange(len(symbols))[:, None]
            symbols = torch.where(symbols < 0, symbols - classes * n_slots, symbols)
        rows, row_of_class = _distinct(symbols)
        rows = rows[:, 1 + self.n_ctx :]
        ends = rows.argmax(dim=1, keepdim=True)
        is_new, node = _shared_nodes(rows, ends)
        symbol, depth = rows[is_new], is_new.nonzero()[:, 1]
        parent = F.pad(node, (1, -1), value=-1)[is_new]

        # Constants are the tokens before the first slot; if a context leads, there are none.
        is_fixed = (rows >= 0).long().cumprod(dim=1) * (self.n_ctx == 0)
        last_fixed = F.pad(node, (1, 0), value=-1).gather(1, is_fixed.sum(dim=1, keepdim=True))
        fixed, above = is_fixed.bool()[is_new], last_fixed.expand_as(node)[is_new]
        # Constants and nodes are numbered apart. The entry behind the last is for -1.
        number = F.pad(torch.where(fixed, fixed.cumsum(0), (~fixed).cumsum(0)) - 1, (0, 1), value=-1)
        self.constants = ConstantTokens(symbol[fixed], number[parent[fixed]])
        symbol, parent, self.depth, above = (column[~fixed] for column in (symbol, parent, depth, above))
        self.token, self.slot = symbol.clamp(min=-1), (-1 - symbol).clamp(min=-1)
        self.above = number[above]
        self.parent = number[parent].masked_fill(parent == above, -1)  # a constant is no node's parent
        self.eot = number[node.gather(1, ends)[row_of_class, 0]]

    def subtree(self, nodes: Tensor) -> ClassTree:
        """The tree of those classes whose EOT is among some of the nodes. Its context vectors are those of this tree.

        Args:
            nodes: (n,) int64, ascending; with each node also its ancestors.
        """
        part = ClassTree.__new__(ClassTree)
        for name in ("n_slots", "class_specific", "sos", "n_ctx", "constants"):
            setattr(part, name, getattr(self, name))
        number = torch.full((len(self) + 1,), -1)  # the entry behind the last is for -1
        number[nodes] = torch.arange(len(nodes))
        for name in ("token", "slot", "depth", "above"):
            setattr(part, name, getattr(self, name)[nodes])
        part.parent = number[self.parent[nodes]]
        part.eot = number[self.eot]
        part.eot = part.eot[part.eot >= 0]
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
    def subtree_end(self) -> Tensor:
        """(N,) int64: one past the last node of the subtree. (Each node lies on its descendants' paths.)"""
        return torch.arange(len(self)) + self.path[self.path >= 0].bincount(minlength=len(self))

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

    def _repr_html_(self) -> str:
        """What a notebook shows: the rows, and the tree drawn."""
        from cocoop_fast.prompts.drawing import describe_tree, draw_tree

        return f'<p>{describe_tree(self)}</p><div style="overflow-x: auto">{draw_tree(self)}</div>'


def _leading_slots(symbols: Tensor) -> int:
    """How many context vectors directly follow SOS in every prompt. (Slots are in the same order in all.)"""
    return int((symbols[:, 1:] < 0).all(dim=0).int().argmin())


def _check(ids: Tensor, n_ctx: int) -> None:
    if ids.ndim != 2 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(
            f"`tokenized_prompts` must be a (K, L) array of integer token ids with K >= 1, got {ids.dtype} "
            f"of shape {tuple(ids.shape)}; pass the output of a CLIP tokenizer."
        )
    if not isinstance(n_ctx, Integral) or n_ctx < 1:
        raise UserError(f"`n_ctx` must be a positive integer, got {n_ctx!r}.")
    if (ids[:, 0] != ids[0, 0]).any():
        raise UserError("`tokenized_prompts` must all begin with the same start-of-text token.")
    ends = ids.argmax(dim=1)
    if (ends <= n_ctx).any():
        k = int((ends <= n_ctx).int().argmax())
        raise UserError(
            f"Prompt {k} ends at position {int(ends[k])}, inside its {n_ctx} context tokens; tokenize each "
            "prompt with a placeholder for every context token."
        )


def _distinct(symbols: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct prompts (Q, L') without padding, in the order of their symbols, and which of them each class has (K,)."""
    ends = symbols.argmax(dim=1)
    column = torch.arange(int(ends.max()) + 1)
    read = symbols[:, : len(column)].masked_fill(column > ends[:, None], 0)
    rows, row_of_class = read.unique(dim=0, return_inverse=True)
    return rows, row_of_class


def _shared_nodes(rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix tree of sorted rows (Q, L'), which are read up to `ends` (Q, 1).

    A row shares the nodes of the one before it as far as their symbols are the same.

    Returns:
        (Q, L') whether a node begins here; row by row these are the nodes in depth-first order. (Q, L') the node.
    """
    is_new = torch.arange(rows.shape[1]) <= ends
    is_new[1:] &= (rows[1:] != rows[:-1]).int().cummax(dim=1).values.bool()
    number = is_new.flatten().cumsum(0).view_as(rows) - 1
    return is_new, number.where(is_new, -1).cummax(dim=0).values


def _paths(parent: Tensor) -> Tensor:
    """(N, P) int64: the nodes from the topmost down to and including each node, padded with -1."""
    n = len(parent)
    above = F.pad(parent, (0, 1), value=-1) % (n + 1)  # n stands for nothing, and nothing is above it
    path = [torch.arange(n)]
    while (path[-1] < n).any():
        path.append(above[path[-1]])
    paths = torch.stack(path, dim=1)[:, :-1].sort(dim=1).values  # parents precede their children
    return paths.masked_fill(paths == n, -1)
