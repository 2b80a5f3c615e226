"""Operations that compute nothing, for passes over meta tensors: what a tower does with them tells its memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops.table import AttentionInputs, TreeAttention
from cocoop_fast.prompts.tree import ClassTree


class HasWorkspace(Protocol):
    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int: ...


class Layout(Protocol):
    """As much of a backend's operations as decides the sizes of a pass's tensors."""

    PANEL_ROWS: int | None
    ROW_PADDING: int

    def packed_bytes(self, columns: int, inner: int) -> int: ...

    def tree_attention(
        self, tree: ClassTree, queries: Tensor | None, device: torch.device
    ) -> HasWorkspace: ...


class ShapeOps:
    """Operations without effect, with the layout of a backend's."""

    record = None

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.PANEL_ROWS, self.ROW_PADDING = layout.PANEL_ROWS, layout.ROW_PADDING

    def tree_attention(self, tree: ClassTree, queries: Tensor | None, device: torch.device) -> TreeAttention:
        return ShapeAttention(self._layout.tree_attention(tree, queries, torch.device("cpu")))

    def frozen_linear(self, layer: Affine, *, packed: bool) -> ShapeLinear:
        return ShapeLinear(self._layout.packed_bytes(*layer.weight.shape) if packed else 0)

    def packed_bytes(self, columns: int, inner: int) -> int:
        return self._layout.packed_bytes(columns, inner)

    def known_arguments(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _nothing(self, *arguments: Any, **options: Any) -> None:
        """Where the operation would write."""

    layer_norm_fwd = layer_norm_bwd = activation_fwd = activation_bwd = _nothing
    assemble_prompts_fwd = assemble_prompts_bwd = assemble_dense = gather_rows = add_rows = _nothing
    head_fwd = head_bwd = cross_entropy_fwd = cross_entropy_bwd = _nothing


class ShapeLinear:
    """Nothing is multiplied."""

    def __init__(self, packed_bytes: int) -> None:
        self.packed_bytes = packed_bytes

    def forward(self, x: Tensor, out: Tensor) -> None: ...

    def forward_norm(
        self, x: Tensor, residual: Tensor, out: Tensor, norm: Affine, y: Tensor, mean: Tensor, rstd: Tensor
    ) -> None: ...

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None: ...

    def backward(self, dy: Tensor, dx: Tensor) -> None: ...

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None: ...


class ShapeAttention:
    """Nothing is attended to."""

    def __init__(self, attention: HasWorkspace) -> None:
        self.workspace_floats = attention.workspace_floats

    def forward(self, inputs: AttentionInputs, o: Tensor) -> None: ...

    def backward(self, *arguments: Any, **options: Any) -> None: ...
