"""Where a pass through the fused tower keeps its rows: a pass memory laid out for a class tree and B images."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from cocoop_fast.engine.constants import TowerConstants
from cocoop_fast.engine.memory import Buffers, PassMemory, Statistics
from cocoop_fast.ops.table import ImageRows, Ops


@dataclass(eq=False)
class LayerActivations:
    """What one layer leaves for its backward. Its rows: all B * R; in layer 0 the B * M context rows."""

    x: Tensor  # what LayerNorm 1 reads: (rows, d); in layer 0 (B, M, d), a part of `residual`
    residual: Tensor  # (queries, d) what is added to the attention's output
    qkv: Tensor  # (rows, 3d) their query, key and value; in the last layer (rows, 2d), key and value
    q: ImageRows  # what attention reads: views of qkv, with the constant node rows in layer 0
    k: ImageRows
    v: ImageRows
    x_mid: Tensor  # (queries, d) after attention: all B * R rows; in the last layer the B * Q EOT rows
    u: Tensor | None  # (queries, w) MLP pre-activations; None: nobody asks for them later
    stats_1: Statistics  # mean and reciprocal standard deviation of each row of x
    stats_q: Statistics  # in the last layer, of the EOT rows of x alone
    stats_2: Statistics  # of x_mid


@dataclass(eq=False)
class Activations:
    """What a pass over `batch` images leaves for its backward, with what both need besides."""

    constants: TowerConstants
    batch: int
    ops: Ops
    scratch: Buffers
    floats: Buffers
    largest_panel_only: bool = False  # enough to see how much memory a pass takes
    layers: list[LayerActivations] = field(default_factory=list)
    done: set[Hashable] = field(default_factory=set)  # passes whose arguments have been checked
    # Passes that came once, which are recorded when they come again, and what repeats those that came twice.
    came: set[Hashable] = field(default_factory=set)
    recorded: dict[Hashable, Callable[[], None] | None] = field(default_factory=dict)
    x_out: Tensor = field(init=False)  # (B * Q, d) what the final LayerNorm reads
    stats_out: Statistics = field(init=False)

    @contextmanager
    def checked_once(self, *pass_: Hashable) -> Iterator[None]:
        """A pass over this memory: what its operations are given has the same shapes every time, and is looked at in the
        first.

        Args:
            pass_: what else decides those shapes.
        """
        with self.ops.known_arguments() if pass_ in self.done else nullcontext():
            yield
        self.done.add(pass_)

    def repeat(self, work: Callable[[], None], *pass_: Hashable) -> None:
        """Do what a pass does with this memory alone, or what the backend recorded of it. A pass that is done once, through a
        part of the tree, is not recorded.

        Args:
            work: reads and writes nothing of the caller's.
            pass_: which it is.
        """
        key = *pass_, torch.get_num_threads()
        if self.ops.record is None or key not in self.came:
            work()
            self.came.add(key)
        elif key not in self.recorded:
            self.recorded[key] = self.ops.record(work)
        else:
            (self.recorded[key] or work)()

    def panels(self, rows: int) -> list[slice]:
        """Slices of about as many rows as the backend likes, all of nearly the same length."""
        count = max(1, round(rows / (self.ops.PANEL_ROWS or max(rows, 1))))
        first = count - 1 if self.largest_panel_only else 0
        bounds = [rows * i // count for i in range(first, count + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    def rows(self, name: str, rows: int, width: int) -> Tensor:
        """(rows, width) scratch memory, its rows where a linear layer reads them fastest."""
        return self.scratch.get(name, rows, width + self.ops.ROW_PADDING)[:, :width]

    def context_of(self, rows: Tensor) -> Tensor:
        """The context rows, (B, M, ...), among all rows (B * R, ...)."""
        return rows.view(self.batch, -1, *rows.shape[1:])[:, : self.constants.tree.n_ctx]


def lay_out(
    constants: TowerConstants,
    batch: int,
    memory: PassMemory,
    ops: Ops,
    workspace_floats: int,
    *,
    largest_panel_only: bool = False,
) -> Activations:
    """The memory laid out for a tree and B images. Made anew only when either is another than last time.

    Args:
        constants: of the model and the class tree.
        batch: B.
        memory: of the pass.
        ops: the backend's.
        workspace_floats: what attention needs in backward.
        largest_panel_only: enough to see how much memory a pass takes.
    """
    last = memory.layout()
    if isinstance(last, Activations) and last.constants is constants and last.batch == batch:
        return last
    c, w = constants, constants.weights
    acts = Activations(c, batch, ops, memory.scratch, memory.floats, largest_panel_only=largest_panel_only)
    acts.layers = [_layer_activations(c, batch, layer, memory) for layer in range(len(w.blocks))]
    acts.x_out = memory.scratch.get("x_out", batch * len(c.leaves), w.width)
    acts.stats_out = memory.statistics("x_out", batch * len(c.leaves))
    # At their full size from the start: memory that grows is there twice for a while. A smaller tree may have the longer
    # panels, so that they get what the longest take.
    rows = max(len(a.x_mid) for a in acts.layers)
    panel = min(rows, 3 * ops.PANEL_ROWS // 2) if ops.PANEL_ROWS else rows
    acts.rows("h", max(panel, batch * c.tree.n_ctx, batch * len(c.leaves)), w.width)
    acts.rows("g", panel, max(block.fc.weight.shape[0] for block in w.blocks))
    if memory.keeps:
        largest = max((a.qkv for a in acts.layers), key=Tensor.numel)
        acts.rows("grad_qkv", *largest.shape)
        memory.floats.get("attention", workspace_floats)
    memory.layout = weakref.ref(acts)
    return acts


def _layer_activations(c: TowerConstants, batch: int, layer: int, memory: PassMemory) -> LayerActivations:
    own, d, m = memory.layers[layer], c.weights.width, c.tree.n_ctx
    first, last = layer == 0, layer == len(c.weights.blocks) - 1
    rows = batch * (m if first else c.tree.rows)
    queries = batch * (len(c.leaves) if last else c.tree.rows)
    qkv = own.get("qkv", rows, (2 if last else 3) * d)
    *q_of_rows, k, v = qkv.view(batch, -1, qkv.shape[1]).split(d, dim=-1)
    q: ImageRows
    if first:
        node_q, node_k, node_v = (part.reshape(-1, d) for part in c.node_qkv)
        q = node_q[c.leaves].expand(batch, -1, -1) if last else (q_of_rows[0], node_q)
        residual = own.get("x_first", batch * c.tree.rows, d)
        x = residual.view(batch, -1, d)[:, :m]
        residual.view(batch, -1, d)[:, m:] = c.node_rows  # and they stay there
        keys: tuple[ImageRows, ImageRows] = (k, node_k), (v, node_v)
    else:
        q = own.get("q", batch, len(c.leaves), d) if last else q_of_rows[0]
        x = residual = own.get("x", rows, d)
        keys = k, v
    if last:
        residual = own.get("x_leaf", queries, d)
    return LayerActivations(
        x=x,
        residual=residual,
        qkv=qkv,
        q=q,
        k=keys[0],
        v=keys[1],
        x_mid=own.get("x_mid", queries, d),
        u=own.get("u", queries, c.weights.blocks[layer].fc.weight.shape[0]) if memory.keeps else None,
        stats_1=memory.statistics(f"x {layer}", rows),
        stats_q=memory.statistics("x_leaf", queries if last else 0),
        stats_2=memory.statistics(f"x_mid {layer}", queries),
    )
