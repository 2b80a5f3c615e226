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

from collections.abc import Sequence
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
    n_ctx, path = tree.n_ctx, _paths(tree)
    rows = len(path)
    if queries is not None:
        path = path[n_ctx + _checked_queries(queries, rows - n_ctx)]
    depth, brings = _keys_of_queries(path)
    tile_query = _tiles(depth, brings)
    tile_chunk, rows_of_slots, visible = _chunks(path, depth, brings, tile_query)
    partial, summed_row, summed_start = _partials(rows_of_slots, rows)
    arrays = tile_query, tile_chunk, rows_of_slots, partial, visible, summed_row, summed_start
    tensors = _on_device(arrays, device)
    return AttentionPlan(
        n_ctx=n_ctx,
        rows=rows,
        queries=len(path),
        one_chunk=len(rows_of_slots) == len(tile_query) - 1,
        tile_query=tensors[0],
        tile_chunk=tensors[1],
        slot_row=tensors[2],
        slot_partial=tensors[3],
        visible=tensors[4],
        summed_row=tensors[5],
        summed_start=tensors[6],
        summed_context=int((summed_row < n_ctx).sum()),
        partials=int(summed_start[-1]),
    )


def _on_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[Tensor]:
    """As int32 tensors, by one transfer. Each begins at 16 bytes, as memory of its own would: Triton compiles for that."""
    ends = np.cumsum([-(-one.size // 4) * 4 for one in arrays])
    together = np.zeros(ends[-1], dtype=np.int32)
    begins = [0, *ends.tolist()[:-1]]
    for begin, one in zip(begins, arrays, strict=True):
        together[begin : begin + one.size] = one.ravel()
    there = torch.from_numpy(together).to(device)
    return [
        there[begin : begin + one.size].view(one.shape) for begin, one in zip(begins, arrays, strict=True)
    ]


def _paths(tree: Tree) -> np.ndarray:
    """(R, P) int32: the rows from the first context row down to and including each one, padded with -1."""
    parent = tree.parent.cpu().numpy()
    node = np.arange(len(parent))
    _check_order(parent, (parent >= node) | (parent < -1))
    depth = np.ones(len(parent), dtype=np.int32)  # nodes on the path to each
    above, ended = np.append(parent, -1), parent
    while (ended >= 0).any():
        depth += ended >= 0
        ended = above[ended]
    depth = np.concatenate([1 + np.arange(tree.n_ctx), tree.n_ctx + depth])
    # In depth-first order the path has, at each depth, the last row before that is so deep.
    place, row = np.arange(depth.max()), np.arange(len(depth))
    path = _last_before(place == depth[:, None] - 1)
    path[place >= depth[:, None]] = -1
    up = np.where(depth > 1, path[row, depth - 2], -1)[tree.n_ctx :]
    _check_order(parent, up != tree.n_ctx + np.where(parent < 0, -1, parent))
    return path


def _last_before(marked: np.ndarray) -> np.ndarray:
    """For each entry of an (n, P) array the last row up to its own that is marked in its column, or -1."""
    row = np.arange(len(marked), dtype=np.int32)[:, None]
    return np.maximum.accumulate(np.where(marked, row, np.int32(-1)), axis=0)


def _check_order(parent: np.ndarray, wrong: np.ndarray) -> None:
    if wrong.any():
        node = int(wrong.argmax())
        raise ValueError(
            f"`parent` must be a tree in depth-first order, got parent {parent[node]} at node {node}"
        )


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


def _keys_of_queries(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q,) each: how many keys a query sees besides SOS, and how many of them the query before it does not see. In
    depth-first order no earlier one sees those either."""
    there = path >= 0
    depth = there.sum(axis=1)
    brings = depth.copy()
    brings[1:] -= ((path[1:] == path[:-1]) & there[1:]).sum(axis=1)
    return depth, brings


def _tiles(depth: np.ndarray, brings: np.ndarray) -> np.ndarray:
    """(T + 1,) where the tiles begin, and the end of the last.

    As many queries as there is room for the keys of, or fewer, but more than half: such that the next tile has few open
    ancestors. It is found for a tile that begins at any query, since what lies before a tile does not matter to it.
    """
    asking = len(depth)
    begin, count = np.arange(asking)[:, None], 1 + np.arange(QUERIES)
    end = np.minimum(begin + count, asking)
    known = np.append(0, np.cumsum(brings))
    slots = 1 + depth[:, None] + known[end] - known[begin + 1]
    # Room for half a tile at least.
    room = -(-(1 + depth + QUERIES // 2) // SLOTS) * SLOTS
    most = ((slots <= room[:, None]) & (begin + count <= asking)).sum(axis=1, keepdims=True)
    open_there = np.append(depth, -1)[end]  # behind the last query none are open
    open_there = np.where((count > most // 2) & (count <= most), open_there, open_there.max() + 1)
    taken = (QUERIES - open_there[:, ::-1].argmin(axis=1)).tolist()  # of equals the largest tile
    bounds = [0]
    while bounds[-1] < asking:
        bounds.append(bounds[-1] + taken[bounds[-1]])
    return np.array(bounds)


def _chunks(
    path: np.ndarray, depth: np.ndarray, brings: np.ndarray, tile_query: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tile_chunk, slot_row and visible of :class:`AttentionPlan`.

    Slots of a tile are filled query by query. A query brings the end of its path; what lies above is in the slots of the
    last query before it that brought a key of that depth.
    """
    first, sizes = tile_query[:-1], np.diff(tile_query)
    tile = np.repeat(np.arange(len(first)), sizes)
    brings = brings.copy()
    brings[first] = depth[first]  # the first query all of its path
    filled = np.cumsum(brings) - brings
    slot = 1 + filled - filled[first][tile]  # the first that each query fills; SOS has slot 0
    used = slot[tile_query[1:] - 1] + brings[tile_query[1:] - 1]
    tile_chunk = np.append(0, np.cumsum(-(-used // SLOTS)))

    place, above = np.arange(path.shape[1]), (depth - brings)[:, None]
    seen, own = path >= 0, (path >= 0) & (place >= above)
    by = _last_before(place >= above)
    slots = SLOTS * tile_chunk[tile][:, None] + slot[by] + place - above[by, 0]
    slot_row = np.full((tile_chunk[-1], SLOTS), -1)
    slot_row.ravel()[slots[own]] = path[own]

    # A word is a sum of different powers of two, which float64 has exactly.
    query = (np.arange(len(path)) - first[tile])[:, None]
    words = (slots // SLOTS * QUERIES + query)[seen]
    bits = np.bincount(words, np.exp2(slots % SLOTS)[seen], QUERIES * tile_chunk[-1]).astype(np.uint32)
    visible = bits.reshape(-1, QUERIES)
    visible[tile_chunk[:-1]] |= 1
    return tile_chunk, slot_row, visible.view(np.int32)


def _partials(slot_row: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """slot_partial, summed_row and summed_start of :class:`AttentionPlan`."""
    readers = np.bincount(slot_row[slot_row >= 0], minlength=rows)
    summed_row = np.flatnonzero(readers != 1)
    summed_start = np.concatenate([[0], np.cumsum(readers[summed_row])])
    shared = (slot_row >= 0) & (readers[slot_row] != 1)
    partial = np.full(slot_row.shape, -1)
    # The slots of one row after the other; within a row, by the stable sort, in the order of the tiles.
    order = np.argsort(slot_row[shared], kind="stable")
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order))
    partial[shared] = numbers
    return partial, summed_row, summed_start
