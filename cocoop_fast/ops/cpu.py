"""The operations of :mod:`cocoop_fast.ops.table` by the C++ kernels: float32 tensors on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.linear import FrozenLinear, GemmLinear
from cocoop_fast.ops.table import ImageRows
from cocoop_fast.prompts.tree import ClassTree

# Fewer rows a panel, and each weight is read too often; more, and the widest intermediate (4d floats a row) leaves the
# cache. docs/performance.md has the measurement.
PANEL_ROWS: int | None = 512

# Rows a large power of two apart would all fall into the same few sets of the first-level cache.
ROW_PADDING: int = 16

PANEL_COLUMNS = 32  # of a packed weight


def available_isas() -> list[str]:
    """The instruction sets that :func:`set_isa` takes here, narrowest first."""
    isas: list[str] = CPP.load().available_isas()
    return isas


def set_isa(isa: str) -> None:
    """Choose the kernels' instruction set; COCOOP_FAST_ISA does the same from outside.

    Raises:
        ValueError: not one of :func:`available_isas`.
    """
    CPP.load().set_isa(isa)


def isa() -> str:
    """The instruction set whose kernels run: "portable" is what is left where no faster one is known."""
    name: str = CPP.load().isa()
    return name


def frozen_linear(layer: Affine, *, packed: bool) -> FrozenLinear:
    """Where the processor has AVX2 or AVX-512, kernels of our own serve: they keep the weight packed for the forward,
    write into the caller's buffers and fuse. Elsewhere the vendor's library does, reached through torch (Apple's, for
    one, uses matrix units that no portable code reaches). docs/performance.md has the comparison.
    """
    from cocoop_fast.ops import cpu

    return PackedLinear(layer) if packed and isa() != "portable" else GemmLinear(layer, cpu)


def packed_bytes(columns: int, inner: int) -> int:
    return 0 if isa() == "portable" else 4 * -(-columns // PANEL_COLUMNS) * PANEL_COLUMNS * inner


class PackedLinear:
    """By the C++ kernels; holds a packed copy of the weight beside it."""

    def __init__(self, layer: Affine) -> None:
        self.weight, self.bias = layer.weight.contiguous(), layer.bias.contiguous()
        self.packed = pack_weight(self.weight)

    @property
    def packed_bytes(self) -> int:
        return self.packed.nbytes

    def forward(self, x: Tensor, out: Tensor) -> None:
        linear_fwd(x, self.packed, self.bias, None, out)

    def forward_norm(
        self, x: Tensor, residual: Tensor, out: Tensor, norm: Affine, y: Tensor, mean: Tensor, rstd: Tensor
    ) -> None:
        linear_fwd(x, self.packed, self.bias, residual, out)
        layer_norm_fwd(out, None, None, norm.weight, norm.bias, norm.eps, y, mean, rstd)

    def forward_activation(self, x: Tensor, kind: str, u: Tensor | None, out: Tensor) -> None:
        linear_activation_fwd(x, self.packed, self.bias, kind, u, out)

    def backward(self, dy: Tensor, dx: Tensor) -> None:
        linear_bwd(dy, self.weight, dx)

    def backward_activation(self, dy: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
        linear_activation_bwd(dy, self.weight, u, kind, du)


def pack_weight(weight: Tensor) -> Tensor:
    """A frozen weight (width, k) as :func:`linear_fwd` reads it: (ceil(width / 32), k, 32), zeros beyond the width."""
    width, k = weight.shape
    packed = torch.empty(-(-width // PANEL_COLUMNS), k, PANEL_COLUMNS)
    CPP.load().pack_weight(_array(weight), _array(packed))
    return packed


def linear_fwd(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """out = x W^T + bias + residual.

    Args:
        x: (n, k), its rows any stride apart; fastest where that is no large power of two.
        packed: W (width, k) from :func:`pack_weight`.
        bias: (width,) or None.
        residual: (n, width) or None; may be `out`.
        out: (n, width), written.
    """
    CPP.load().linear_fwd(_array(x), _array(packed), _optional(bias), _optional(residual), _array(out))


def linear_bwd(dy: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx (n, k) = dy W, with dy (n, width) and W (width, k) as it lies."""
    CPP.load().linear_bwd(_array(dy), _array(weight), _array(dx))


def linear_activation_fwd(
    x: Tensor, packed: Tensor, bias: Tensor, kind: str, u: Tensor | None, out: Tensor
) -> None:
    """u (n, width) = x W^T + bias, which may be None and is then not kept; out (n, width) = act(u)."""
    CPP.load().linear_activation_fwd(_array(x), _array(packed), _array(bias), kind, _optional(u), _array(out))


def linear_activation_bwd(dy: Tensor, weight: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
    """du (n, k) = (dy W) act'(u): W (width, k) is of the layer that reads the activation, u (n, k) its argument."""
    CPP.load().linear_activation_bwd(_array(dy), _array(weight), _array(u), kind, _array(du))


def layer_norm_fwd(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    CPP.load().layer_norm_fwd(
        _array(x), _optional(bias), _optional(residual), _array(gamma), _array(beta), eps,
        _array(y), _array(mean), _array(rstd),
    )  # fmt: skip


def layer_norm_bwd(
    dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor, *, accumulate: bool
) -> None:
    CPP.load().layer_norm_bwd(
        _array(dy), _array(x), _array(gamma), _array(mean), _array(rstd), _array(dx), accumulate
    )


def activation_fwd(u: Tensor, kind: str, out: Tensor) -> None:
    CPP.load().activation_fwd(_array(u), kind, _array(out))


def activation_bwd(u: Tensor, kind: str, dg: Tensor) -> None:
    CPP.load().activation_bwd(_array(u), kind, _array(dg))


class TreeAttention:
    """See :class:`cocoop_fast.ops.table.TreeAttention`. The plan of the tree is the extension's, which checks it."""

    def __init__(self, tree: ClassTree, queries: Tensor | None = None) -> None:
        ids = None if queries is None else _array(queries, torch.int64)
        self.n_ctx = tree.n_ctx
        self.all_rows = queries is None
        self.plan: Any = CPP.load().AttentionPlan(tree.n_ctx, _array(tree.parent, torch.int64), ids)

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        return int(self.plan.workspace_floats(batch, heads, head_size))

    def forward(
        self, q: ImageRows, k: ImageRows, v: ImageRows, sos_k: Tensor, sos_v: Tensor, heads: int, o: Tensor
    ) -> None:
        CPP.load().tree_attention_fwd(self.plan, *self._inputs(q, k, v, sos_k, sos_v), heads, _array(o))

    def backward(
        self,
        grad_o: Tensor,
        q: ImageRows,
        k: ImageRows,
        v: ImageRows,
        sos_k: Tensor,
        sos_v: Tensor,
        heads: int,
        dq: Tensor | None,
        dk: Tensor,
        dv: Tensor,
        workspace: Tensor,
        context_only: bool = False,
    ) -> None:
        CPP.load().tree_attention_bwd(
            self.plan, _array(grad_o), *self._inputs(q, k, v, sos_k, sos_v), heads,
            _optional(dq), _array(dk), _array(dv), _array(workspace), context_only,
        )  # fmt: skip

    def _inputs(
        self, q: ImageRows, k: ImageRows, v: ImageRows, sos_k: Tensor, sos_v: Tensor
    ) -> tuple[np.ndarray | None, ...]:
        """As the extension takes them: q_ctx, k_ctx, v_ctx, q_node, k_node, v_node, sos_k, sos_v."""
        if self.all_rows:
            q_ctx, q_node = self._split(q)
        elif isinstance(q, Tensor):
            q_ctx, q_node = None, _array(q)
        else:
            raise ValueError("`q` must be one (B, Q, d) tensor: the context rows have no queries here")
        (k_ctx, k_node), (v_ctx, v_node) = self._split(k), self._split(v)
        return q_ctx, k_ctx, v_ctx, q_node, k_node, v_node, _array(sos_k).ravel(), _array(sos_v).ravel()

    def _split(self, rows: ImageRows) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(rows, Tensor):
            whole = _array(rows)
            return whole[..., : self.n_ctx, :], whole[..., self.n_ctx :, :]
        return _array(rows[0]), _array(rows[1])


def tree_attention(tree: ClassTree, queries: Tensor | None, device: torch.device) -> TreeAttention:
    return TreeAttention(tree, queries)


def assemble_prompts_fwd(
    vectors: Tensor | None,
    shift: Tensor,
    position: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    CPP.load().assemble_prompts_fwd(
        _optional(vectors), _array(shift), _array(position), _array(gamma), _array(beta), eps,
        _array(x), _array(y), _array(mean), _array(rstd),
    )  # fmt: skip


def assemble_prompts_bwd(dx: Tensor, d_vectors: Tensor | None, d_shift: Tensor) -> None:
    CPP.load().assemble_prompts_bwd(_array(dx), _optional(d_vectors), _array(d_shift))


def assemble_dense(context: Tensor, prefix: Tensor, suffix: Tensor, out: Tensor) -> None:
    CPP.load().assemble_dense(_array(context), _array(prefix), _array(suffix), _array(out))


def gather_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    CPP.load().gather_rows(_array(x), _array(index, torch.int64), _array(out))


def add_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    CPP.load().add_rows(_array(x), _array(index, torch.int64), _array(out))


def head_fwd(features: Tensor, image: Tensor, scale: Tensor, logits: Tensor, inverse_norms: Tensor) -> None:
    CPP.load().head_fwd(_array(features), _array(image), float(scale), _array(logits), _array(inverse_norms))


def head_bwd(
    features: Tensor,
    image: Tensor,
    scale: Tensor,
    logits: Tensor,
    inverse_norms: Tensor,
    d_logits: Tensor,
    d_features: Tensor,
) -> None:
    CPP.load().head_bwd(
        _array(features), _array(image), float(scale), _array(logits), _array(inverse_norms),
        _array(d_logits), _array(d_features),
    )  # fmt: skip


def cross_entropy_fwd(logits: Tensor, labels: Tensor, loss: Tensor) -> None:
    loss.fill_(CPP.load().cross_entropy_fwd(_array(logits), _array(labels, torch.int64)))


def cross_entropy_bwd(logits: Tensor, labels: Tensor, grad_loss: Tensor, d_logits: Tensor) -> None:
    CPP.load().cross_entropy_bwd(
        _array(logits), _array(labels, torch.int64), float(grad_loss), _array(d_logits)
    )


def _array(tensor: Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The tensor's memory as numpy sees it; its shape and strides are checked by the extension."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype:
        raise ValueError(
            f"The C++ kernels take {dtype} tensors on the CPU here, got {tensor.dtype} on {tensor.device}."
        )
    return tensor.detach().numpy()


def _optional(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _array(tensor)
