"""Which rows ask which keys of a class tree, cut into tiles for the GPU; built once per class list, on the host.

All M + N rows of an image form one tree below SOS: context row m hangs on context row m - 1, the first class tokens on
the last context row. In its depth-first order a row sees SOS, its ancestors and itself, whatever kind it is.

A tile is a run of at most QUERIES query rows. Its keys, the union of what they see, fill "slots": SOS first, then the
ancestors of its first row, then what is new in the others. Slots come in chunks of SLOTS, one of which nearly always
suffices, with one word a query and chunk that has a bit for each key the query sees.

Backward gives every tile the gradients of its slots' keys and values. A row that is a slot of one tile only gets them
at once. One that several tiles read (the context, the ancestors of a tile's first row) gets a "partial" from each, and
the partials of a row lie together in the order of the tiles, so that their sum is that of a contiguous range in a fixed
order: no atomics, and the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

QUERIES = 16  # of a tile: the least that a matrix instruction takes
SLOTS = 32  # of a chunk: the bits of a word


class Tree(Protocol):
    """What is needed of a class tree."""

    n_ctx: int  # M
    parent: Tensor  # (N,) an earlier node, or -1


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The tiles of a tree as int32 tensors. T tiles, C chunks, P partials, S rows that several tiles read.

    Attributes:
        n_ctx: M.
        rows: R = M + N.
        queries: how many rows ask: R or Q.
        one_chunk: no tile has more than one chunk.
        tile_query: (T + 1,) tile t holds the queries tile_query[t] .. tile_query[t + 1] - 1,
        tile_chunk: (T + 1,) and its keys are in chunks tile_chunk[t] .. tile_chunk[t + 1] - 1.
        slot_row: (C, SLOTS) the row of a key; -1 for SOS, and for slots that no query sees.
        slot_partial: (C, SLOTS) the partial that takes the gradients of this key; -1: they are the row's own.
        visible: (C, QUERIES) bit s of word i: query i of the tile sees slot s. Queries that a tile has not see SOS.
        summed_row: (S,) ascending: rows whose gradients are sums of partials,
        summed_start: (S + 1,) namely summed_start[i] .. summed_start[i + 1] - 1; of none if no query sees them.
        summed_context: how many of them are context rows.
        partials: P.
    """

    n_ctx: int
    rows: int
    queries: int
    one_chunk: bool
    tile_query: Tensor
    tile_chunk: Tensor
    slot_row: Tensor
    slot_partial: Tensor
    visible: Tensor
    summed_row: Tensor
    summed_start: Tensor
    summed_context: int
    partials: int

    @property
    def tiles(self) -> int:
        """T."""
        return len(self.tile_query) - 1

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        """The partials' size: P rows of dk and dv an image."""
        return batch * self.partials * 2 * heads * head_size


def plan_attention(tree: Tree, queries: Tensor | None, device: torch.device | str) -> AttentionPlan:
    """The plan of a tree.

    Args:
        tree: the class tree.
        queries: the query rows, strictly ascending nodes, (Q,); None if all R rows are.
        device: where the plan's tensors go.

    Raises:
        ValueError: `parent` is no tree in depth-first order, or `queries` are no ascending nodes.
    """
    n_ctx, above = tree.n_ctx, _rows_above(tree)
    asking = (
        np.arange(len(above)) if queries is None else n_ctx + _checked_queries(queries, len(above) - n_ctx)
    )
    tile_query, tile_chunk = [0], [0]
    slot_row: list[np.ndarray] = []
    visible: list[np.ndarray] = []
    for end, keys, seen in _tiles(above, asking):
        chunks = -(-len(keys) // SLOTS)
        row = np.full(chunks * SLOTS, -1)
        row[: len(keys)] = keys
        slot_row.append(row.reshape(chunks, SLOTS))
        visible.append(_words(seen, chunks))
        tile_query.append(end)
        tile_chunk.append(tile_chunk[-1] + chunks)
    rows_of_slots = np.concatenate(slot_row)
    partial, summed_row, summed_start = _partials(rows_of_slots, len(above))

    def on_device(values: np.ndarray | list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(values).astype(np.int32)).to(device)

    return AttentionPlan(
        n_ctx=n_ctx,
        rows=len(above),
        queries=len(asking),
        one_chunk=len(rows_of_slots) == len(slot_row),
        tile_query=on_device(tile_query),
        tile_chunk=on_device(tile_chunk),
        slot_row=on_device(rows_of_slots),
        slot_partial=on_device(partial),
        visible=on_device(np.concatenate(visible).view(np.int32)),
        summed_row=on_device(summed_row),
        summed_start=on_device(summed_start),
        summed_context=int((summed_row < n_ctx).sum()),
        partials=int(summed_start[-1]),
    )


def _rows_above(tree: Tree) -> list[int]:
    """The parent of each of the M + N rows; -1 is SOS."""
    parent = tree.parent.tolist()
    path: list[int] = []
    for node, up in enumerate(parent):
        while path and path[-1] != up:
            path.pop()
        if (up != -1 and not path) or up >= node:
            raise ValueError(f"`parent` must be a tree in depth-first order, got parent {up} at node {node}")
        path.append(node)
    return [*range(-1, tree.n_ctx - 1), *(tree.n_ctx + up if up >= 0 else tree.n_ctx - 1 for up in parent)]


def _checked_queries(queries: Tensor, nodes: int) -> np.ndarray:
    asking = queries.cpu().numpy()
    if asking.ndim != 1 or asking.dtype.kind != "i":
        raise ValueError(
            f"`queries` must be (Q,) integers, got {queries.dtype} of shape {tuple(queries.shape)}"
        )
    if not len(asking) or (np.diff(asking) <= 0).any():
        raise ValueError(f"`queries` must be strictly ascending nodes, at least one, got {asking}")
    if asking[0] < 0 or asking[-1] >= nodes:
        raise ValueError(f"`queries` must be nodes 0 .. {nodes - 1}, got {asking[0]} .. {asking[-1]}")
    return asking


def _tiles(above: list[int], asking: np.ndarray) -> Iterator[tuple[int, list[int], list[list[int]]]]:
    """For each tile: its end among `asking`, the rows of its slots, and the slots that each of its queries sees."""
    begin = 0
    while begin < len(asking):
        keys = [-1]
        slot_of = {-1: 0}
        seen: list[list[int]] = []
        sizes: list[int] = []  # slots in use after each query
        limit = 0
        for row in asking[begin : begin + QUERIES].tolist():
            path = _path(above, row)
            new = [key for key in path if key not in slot_of]
            # Room for half a tile at least.
            limit = limit or -(-(1 + len(new) + QUERIES // 2) // SLOTS) * SLOTS
            if len(keys) + len(new) > limit:
                break
            slot_of.update((key, len(keys) + i) for i, key in enumerate(new))
            keys += new
            seen.append([0, *(slot_of[key] for key in path)])
            sizes.append(len(keys))
        count = _best_cut([len(slots) for slots in seen], begin, above, asking)
        begin += count
        yield begin, keys[: sizes[count - 1]], seen[:count]


def _best_cut(depths: list[int], begin: int, above: list[int], asking: np.ndarray) -> int:
    """How many of these queries to take: more than half, and such that the next tile has few open ancestors."""
    best, fewest = len(depths), None
    for count in range(len(depths), len(depths) // 2, -1):
        if begin + count == len(asking):
            return count
        depth = depths[count] if count < len(depths) else 1 + len(_path(above, int(asking[begin + count])))
        if fewest is None or depth < fewest:
            best, fewest = count, depth
    return best


def _path(above: list[int], row: int) -> list[int]:
    """The rows from the first context row down to and including `row`."""
    path = []
    while row >= 0:
        path.append(row)
        row = above[row]
    return path[::-1]


def _words(seen: list[list[int]], chunks: int) -> np.ndarray:
    """(chunks, QUERIES) uint32: a bit for each slot that a query sees."""
    bits = np.zeros((QUERIES, chunks * SLOTS), dtype=bool)
    bits[:, 0] = True
    for query, slots in enumerate(seen):
        bits[query, slots] = True
    weights = np.uint32(1) << np.arange(SLOTS, dtype=np.uint32)
    words = (bits.reshape(QUERIES, chunks, SLOTS) * weights).sum(axis=2, dtype=np.uint32)
    return np.ascontiguousarray(words.T)


def _partials(slot_row: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """slot_partial, summed_row and summed_start of :class:`AttentionPlan`."""
    readers = np.bincount(slot_row[slot_row >= 0], minlength=rows)
    summed_row = np.flatnonzero(readers != 1)
    summed_start = np.concatenate([[0], np.cumsum(readers[summed_row])])
    shared = np.isin(slot_row, summed_row)
    partial = np.full(slot_row.shape, -1)
    # The slots of one row after the other; within a row, by the stable sort, in the order of the tiles.
    order = np.argsort(slot_row[shared], kind="stable")
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order))
    partial[shared] = numbers
    return partial, summed_row, summed_start
