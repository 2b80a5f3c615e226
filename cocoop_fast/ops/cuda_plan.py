"""AttentionPlan of csrc/cuda/kernels.h: which query rows read which keys, planned once for a class tree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.prompts.tree import ClassTree

# Query rows that a warp sums towards a key's gradient: fewer, and the partial sums cost more than they save; more, and
# the warps of the keys that all rows read are still at work when the others are done.
READERS_PER_TASK = 64


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """As int32 tensors on the device.

    The query rows that read a key are a contiguous range, that of its descendants, and so are the chunks of at most
    READERS_PER_TASK into which the range is cut.
    """

    n_ctx: int
    n_nodes: int
    n_ctx_queries: int  # M, or 0 where some nodes alone have queries
    n_queries: int
    slots: int  # what all query rows of an image read, in keys
    path_begin: Tensor  # (node queries + 1,)
    path: Tensor  # (path_begin[-1],)
    reader_tasks: Tensor  # (., 5): key, slot, begin, end, partial; context keys first
    reduce_tasks: Tensor  # (., 3): key, begin, end; context keys first
    n_partials: int
    context_reader_tasks: int
    context_reduce_tasks: int

    @classmethod
    def of(cls, tree: ClassTree, queries: Tensor | None, device: torch.device) -> AttentionPlan:
        m, n = tree.n_ctx, len(tree)
        asking = np.arange(n) if queries is None else _ascending_nodes(queries, n)
        n_ctx_queries = m if queries is None else 0
        n_queries = n_ctx_queries + len(asking)
        path = tree.path.numpy()
        length = (path >= 0).sum(axis=1)

        # The readers of every key, and its slot in their rows.
        nodes = np.arange(n)
        begin = n_ctx_queries + np.searchsorted(asking, nodes)
        end = n_ctx_queries + np.searchsorted(asking, tree.subtree_end.numpy())
        begin = np.concatenate([np.arange(m) if queries is None else np.zeros(m, dtype=np.int64), begin])
        end = np.concatenate([np.full(m, n_queries), end])
        slot = np.concatenate([1 + np.arange(m), m + length])
        parts = np.maximum(1, -(-(end - begin) // READERS_PER_TASK))

        first_partial = np.cumsum(np.where(parts > 1, parts, 0)) - np.where(parts > 1, parts, 0)
        key = np.repeat(np.arange(m + n), parts)
        part = np.arange(len(key)) - np.repeat(np.cumsum(parts) - parts, parts)
        task_begin = begin[key] + part * READERS_PER_TASK
        task_end = np.minimum(end[key], task_begin + READERS_PER_TASK)
        partial = np.where(parts[key] > 1, first_partial[key] + part, -1)
        tasks = np.stack([key, slot[key], task_begin, task_end, partial], axis=1)
        # Context keys part by part: warps that stand together then read the same rows.
        of_context = key < m
        tasks = np.concatenate(
            [tasks[of_context][np.argsort(part[of_context], kind="stable")], tasks[~of_context]]
        )
        summed = np.flatnonzero(parts > 1)
        reduces = np.stack([summed, first_partial[summed], first_partial[summed] + parts[summed]], axis=1)

        asking_paths = path[asking]
        path_begin = np.concatenate([[0], np.cumsum(length[asking])])

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)

        return cls(
            n_ctx=m,
            n_nodes=n,
            n_ctx_queries=n_ctx_queries,
            n_queries=n_queries,
            slots=n_ctx_queries * (n_ctx_queries + 3) // 2 + len(asking) * (1 + m) + int(path_begin[-1]),
            path_begin=on_device(path_begin),
            path=on_device(asking_paths[asking_paths >= 0]),
            reader_tasks=on_device(tasks),
            reduce_tasks=on_device(reduces),
            n_partials=int(parts[parts > 1].sum()),
            context_reader_tasks=int(of_context.sum()),
            context_reduce_tasks=int((summed < m).sum()),
        )

    def argument(self, context_only: bool = False) -> tuple[int, ...]:
        """As the extension takes it; with `context_only` the tasks of the context keys alone."""
        return (
            self.n_ctx,
            self.n_ctx_queries,
            self.n_queries - self.n_ctx_queries,
            self.path_begin.data_ptr(),
            self.path.data_ptr(),
            self.reader_tasks.data_ptr(),
            self.context_reader_tasks if context_only else len(self.reader_tasks),
            self.reduce_tasks.data_ptr(),
            self.context_reduce_tasks if context_only else len(self.reduce_tasks),
        )


def _ascending_nodes(queries: Tensor, n_nodes: int) -> np.ndarray:
    nodes = queries.cpu().numpy()
    if nodes.ndim != 1 or nodes.dtype.kind != "i":
        raise ValueError(f"`queries` must be (Q,) integers, got {queries.dtype}")
    outside = (nodes < 0) | (nodes >= n_nodes)
    if outside.any():
        raise ValueError(f"`queries` must be nodes 0 .. {n_nodes - 1}, got {nodes[outside][:1]}")
    if not (np.diff(nodes) > 0).all():
        raise ValueError("`queries` must be strictly ascending")
    return nodes
