"""The operations of :mod:`cocoop_fast.ops.table` by the C++ kernels: float32 tensors on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops import recording
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.linear import FrozenLinear, GemmLinear
from cocoop_fast.ops.table import AttentionInputs, ImageRows
from cocoop_fast.prompts.tree import ClassTree

# Fewer rows a panel, and each weight is read too often; more, and the widest intermediate (4d floats a row) leaves the
# cache. docs/performance.md has the measurement.
PANEL_ROWS: int | None = 512

# Rows a large power of two apart would all fall into the same few sets of the first-level cache.
ROW_PADDING: int = 16

PANEL_COLUMNS = 32  # of a packed weight

known_arguments = nullcontext[None]  # the extension looks at each call
record = recording.record


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


def multiply_add_loop(rounds: int) -> float:
    """Multiply-adds of registers on all threads, without memory. Returns how many FLOPs that were."""
    return float(CPP.load().multiply_add_loop(rounds))


def read_loop(data: Tensor) -> float:
    """Reads (n,) float32 on all threads. Returns their sum."""
    return float(CPP.load().read_loop(_array(data)))


def frozen_linear(layer: Affine, *, packed: bool) -> FrozenLinear:
    """Where :func:`multiplies_itself` says so, kernels of our own serve: they keep the weight packed for the forward, write
    into the caller's buffers and fuse. Elsewhere the vendor's library does, reached through torch.
    """
    from cocoop_fast.ops import cpu

    return PackedLinear(layer) if packed and multiplies_itself() else GemmLinear(layer, cpu)


def multiplies_itself() -> bool:
    """Whether products are the kernels' own: those of AVX2, AVX-512 and NEON, docs/performance.md has the comparison.

    Not where the extension was built without OpenMP and would use one core, and not on macOS, whose library uses matrix
    units that no kernel reaches.
    """
    return isa() != "portable" and sys.platform != "darwin" and bool(CPP.load().build_info()["openmp"])


def packed_bytes(columns: int, inner: int) -> int:
    return 4 * -(-columns // PANEL_COLUMNS) * PANEL_COLUMNS * inner if multiplies_itself() else 0


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


def _kernel(name: str, scalar: int | None = None, logarithm: int | None = None) -> Callable[..., None]:
    """The extension's function of this name, which checks all that it is given.

    Args:
        name: of both.
        scalar: the argument that is a number there, and a tensor of one here.
        logarithm: the argument that is its logarithm here besides.
    """

    def given(place: int, one: Any) -> object:
        if place == logarithm:
            one = one.exp()
        return float(one) if place in (scalar, logarithm) else _value(one)

    def call(*arguments: object, **options: object) -> None:
        values = [given(*numbered) for numbered in enumerate(arguments)]
        _call(name, *values, **{key: _value(one) for key, one in options.items()})

    return call


def _call(name: str, *arguments: object, **options: object) -> None:
    getattr(CPP.load(), name)(*arguments, **options)
    recording.keep(arguments, options)


def _value(argument: object) -> object:
    return _array(argument) if isinstance(argument, Tensor) else argument


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as numpy sees it."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    if tensor.device.type != "cpu" or tensor.dtype != dtype:
        raise ValueError(
            f"The C++ kernels take {dtype} tensors on the CPU here, got {tensor.dtype} on {tensor.device}."
        )
    return tensor.detach().numpy()


# Of x (n, k), its rows any stride apart, fastest where that is no large power of two, and W (width, k), in forward as
# :func:`pack_weight` lays it out:
#   linear_fwd(x, packed, bias or None, residual or None, out): out = x W^T + bias + residual
#   linear_bwd(dy, W, dx): dx = dy W
#   linear_activation_fwd(x, packed, bias, kind, u or None, out): u = x W^T + bias, out = act(u)
#   linear_activation_bwd(dy, W, u, kind, du): du = (dy W) act'(u), W of the layer that reads the activation
linear_fwd = _kernel("linear_fwd")
linear_bwd = _kernel("linear_bwd")
linear_activation_fwd = _kernel("linear_activation_fwd")
linear_activation_bwd = _kernel("linear_activation_bwd")

layer_norm_fwd = _kernel("layer_norm_fwd")
layer_norm_bwd = _kernel("layer_norm_bwd")
activation_fwd = _kernel("activation_fwd")
activation_bwd = _kernel("activation_bwd")
assemble_prompts_fwd = _kernel("assemble_prompts_fwd")
assemble_prompts_bwd = _kernel("assemble_prompts_bwd")
assemble_dense = _kernel("assemble_dense")
gather_rows = _kernel("gather_rows")
add_rows = _kernel("add_rows")
head_fwd = _kernel("head_fwd", logarithm=2)  # the extension takes the scale itself
head_bwd = _kernel("head_bwd", logarithm=2)
cross_entropy_bwd = _kernel("cross_entropy_bwd", scalar=2)


def cross_entropy_fwd(logits: Tensor, labels: Tensor, loss: Tensor) -> None:
    loss.fill_(CPP.load().cross_entropy_fwd(_array(logits), _array(labels)))


class TreeAttention:
    """See :class:`cocoop_fast.ops.table.TreeAttention`. The plan of the tree is the extension's, which checks it."""

    def __init__(self, tree: ClassTree, queries: Tensor | None = None) -> None:
        ids = None if queries is None else _array(queries)
        self.n_ctx = tree.n_ctx
        self.all_rows = queries is None
        self.plan: Any = CPP.load().AttentionPlan(tree.n_ctx, _array(tree.parent), ids)

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        return int(self.plan.workspace_floats(batch, heads, head_size))

    def forward(self, inputs: AttentionInputs, o: Tensor) -> None:
        _call("tree_attention_fwd", self.plan, *self._arrays(inputs), _array(o))

    def backward(
        self,
        grad_o: Tensor,
        inputs: AttentionInputs,
        dq: Tensor | None,
        dk: Tensor,
        dv: Tensor,
        workspace: Tensor,
        *,
        context_only: bool = False,
    ) -> None:
        _call(
            "tree_attention_bwd",
            self.plan, _array(grad_o), *self._arrays(inputs), None if dq is None else _array(dq),
            _array(dk), _array(dv), _array(workspace), context_only,
        )  # fmt: skip

    def _arrays(self, inputs: AttentionInputs) -> tuple[Any, ...]:
        """As the extension takes them: q_ctx, k_ctx, v_ctx, q_node, k_node, v_node, sos_k, sos_v, heads."""
        q, k, v, sos_k, sos_v, heads = inputs
        if self.all_rows:
            q_ctx, q_node = self._split(q)
        elif isinstance(q, Tensor):
            q_ctx, q_node = None, _array(q)
        else:
            raise ValueError("`q` must be one (B, Q, d) tensor: the context rows have no queries here")
        (k_ctx, k_node), (v_ctx, v_node) = self._split(k), self._split(v)
        return (
            q_ctx,
            k_ctx,
            v_ctx,
            q_node,
            k_node,
            v_node,
            _array(sos_k).ravel(),
            _array(sos_v).ravel(),
            heads,
        )

    def _split(self, rows: ImageRows) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(rows, Tensor):
            whole = _array(rows)
            return whole[..., : self.n_ctx, :], whole[..., self.n_ctx :, :]
        return _array(rows[0]), _array(rows[1])


def tree_attention(tree: ClassTree, queries: Tensor | None, device: torch.device) -> TreeAttention:
    return TreeAttention(tree, queries)
