"""ClassTree: the prefix tree of the class names' tokens, in depth-first order.

CLIP's text transformer is causal, so the hidden state of a class token depends only on the tokens before it:
SOS, the context, and the class tokens above it in this tree. One node is one row of work an image.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.errors import UserError


class ClassTree:
    """Prefix tree over the tokens that follow the context in K prompts.

    Nodes are in depth-first order with the classes sorted by token sequence, so every subtree is a contiguous
    range: the rows that read node n's key are exactly ``n .. subtree_end[n] - 1``.

    Args:
        tokenized_prompts: integer (K, L): SOS, ``n_ctx`` context placeholders, the class tokens, EOT, padding.
            EOT is the largest id of a row, as in CLIP's own pooling.
        n_ctx: M, the number of context tokens after SOS.

    Attributes (all int64, on the CPU):
        token: (N,) token id of each node.
        parent: (N,) parent node, -1 for the first token after the context.
        depth: (N,) tokens between the context and the node. Its position in the prompt is ``1 + n_ctx + depth``.
        subtree_end: (N,) one past the last node of the subtree.
        eot: (K,) the EOT node of each class. Classes with the same tokens share it.

    Raises:
        UserError: the ids are not a (K, L) integer array, or a prompt has no room for its context.
    """

    def __init__(self, tokenized_prompts: Tensor | np.ndarray, n_ctx: int) -> None:
        ids = np.asarray(
            tokenized_prompts.cpu() if isinstance(tokenized_prompts, Tensor) else tokenized_prompts
        )
        _check(ids, n_ctx)
        self.n_ctx = n_ctx
        self.n_classes = len(ids)
        self.sos = int(ids[0, 0])
        ends = ids.argmax(axis=1)
        paths = [tuple(row[1 + n_ctx : end + 1].tolist()) for row, end in zip(ids, ends, strict=True)]
        self._build(paths)

    def _build(self, paths: list[tuple[int, ...]]) -> None:
        token: list[int] = []
        parent: list[int] = []
        depth: list[int] = []
        eot = np.empty(len(paths), dtype=np.int64)
        open_nodes: list[int] = []  # the path from the root to the last node made
        previous: tuple[int, ...] = ()
        for k in sorted(range(len(paths)), key=paths.__getitem__):
            path = paths[k]
            shared = _common_prefix(previous, path)
            del open_nodes[shared:]
            for level in range(shared, len(path)):
                parent.append(open_nodes[-1] if open_nodes else -1)
                open_nodes.append(len(token))
                token.append(path[level])
                depth.append(level)
            eot[k] = open_nodes[-1]
            previous = path
        self.token, self.parent, self.depth = (torch.tensor(a) for a in (token, parent, depth))
        self.subtree_end = torch.from_numpy(_subtree_ends(np.asarray(depth)))
        self.eot = torch.from_numpy(eot)

    def __len__(self) -> int:
        """N, the number of nodes."""
        return len(self.token)

    @property
    def max_depth(self) -> int:
        """The length of the longest path, in tokens (EOT included)."""
        return int(self.depth.max()) + 1

    @property
    def rows(self) -> int:
        """R = M + N: the rows of one image."""
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
        """(N, max_depth) int64: the nodes from the root down to and including each node, padded with -1."""
        path = torch.full((len(self), self.max_depth), -1, dtype=torch.int64)
        for node in range(len(self)):  # parents precede their children
            level = int(self.depth[node])
            if level:
                path[node, :level] = path[self.parent[node], :level]
            path[node, level] = node
        return path

    def __repr__(self) -> str:
        return (
            f"ClassTree(classes={self.n_classes}, n_ctx={self.n_ctx}, nodes={len(self)}, "
            f"leaves={len(self.leaves)}, max_depth={self.max_depth})"
        )


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


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


def _subtree_ends(depth: np.ndarray) -> np.ndarray:
    """One past each node's last descendant: the next node that is not deeper."""
    ends = np.full(len(depth), len(depth), dtype=np.int64)
    waiting: list[int] = []
    for node, level in enumerate(depth):
        while waiting and depth[waiting[-1]] >= level:
            ends[waiting.pop()] = node
        waiting.append(node)
    return ends
