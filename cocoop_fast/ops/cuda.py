"""The operations of :mod:`cocoop_fast.ops.table` on NVIDIA GPUs: attention and assembly by CUDA C++ kernels, the rest by
Triton's.

Tensors are on one CUDA device; work is launched on torch's current stream, and nothing waits for the device. Rows that
attention reads lie at multiples of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cocoop_fast.ops.cuda_plan import AttentionPlan
from cocoop_fast.ops.extensions import CUDA
from cocoop_fast.ops.table import ImageRows
from cocoop_fast.ops.triton import (
    PANEL_ROWS,
    ROW_PADDING,
    activation_bwd,
    activation_fwd,
    add_rows,
    cross_entropy_bwd,
    cross_entropy_fwd,
    frozen_linear,
    gather_rows,
    head_bwd,
    head_fwd,
    layer_norm_bwd,
    layer_norm_fwd,
    packed_bytes,
)
from cocoop_fast.prompts.tree import ClassTree

__all__ = [
    "PANEL_ROWS",
    "ROW_PADDING",
    "activation_bwd",
    "activation_fwd",
    "add_rows",
    "assemble_dense",
    "assemble_prompts_bwd",
    "assemble_prompts_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "frozen_linear",
    "gather_rows",
    "head_bwd",
    "head_fwd",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "packed_bytes",
    "tree_attention",
]

# The types of rows, and the numbers that the extension knows them by.
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}

_ALIGNMENT = 16  # bytes, of a load


class TreeAttention:
    """See :class:`cocoop_fast.ops.table.TreeAttention`. A head has a multiple of 8 numbers, 128 at most."""

    def __init__(self, tree: ClassTree, queries: Tensor | None, device: torch.device) -> None:
        self.all_rows = queries is None
        self.plan = AttentionPlan.of(tree, queries, device)

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        """Two numbers for each slot, and the partial sums of the keys that many rows read."""
        return self._weight_floats(batch, heads) + batch * self.plan.n_partials * 2 * heads * head_size

    def forward(
        self, q: ImageRows, k: ImageRows, v: ImageRows, sos_k: Tensor, sos_v: Tensor, heads: int, o: Tensor
    ) -> None:
        like = self._check_queries("o", o, heads)
        inputs = self._inputs(q, k, v, sos_k, sos_v, heads, like)
        rows = _rows("o", o, like, like.batch, self.plan.n_queries, written=True)
        if like.batch:
            like.launch("tree_attention_fwd", **inputs, plan=self.plan.argument(), o=rows)

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
        plan = self.plan
        like = self._check_queries("grad_o", grad_o, heads)
        inputs = self._inputs(q, k, v, sos_k, sos_v, heads, like)
        key_rows = plan.n_ctx if context_only else plan.n_ctx + plan.n_nodes
        dq_rows = plan.n_ctx if context_only else plan.n_queries
        if context_only and not self.all_rows:
            _require(dq is None, "`dq` must be None: no context row is among the queries")
            dq_rows = 0
        else:
            _require(dq is not None, "`dq` must be a tensor, got None")
        arguments = {
            "grad_o": _rows("grad_o", grad_o, like, like.batch, plan.n_queries),
            "dq": _NO_ROWS if dq is None else _rows("dq", dq, like, like.batch, dq_rows, written=True),
            "dk": _rows("dk", dk, like, like.batch, key_rows, written=True),
            "dv": _rows("dv", dv, like, like.batch, key_rows, written=True),
        }
        needed = self.workspace_floats(like.batch, heads, like.width // heads)
        _require(
            workspace.ndim == 1 and len(workspace) >= needed,
            f"`workspace` must have at least {needed} numbers, got {tuple(workspace.shape)}",
        )
        address = _dense("workspace", workspace, tuple(workspace.shape), like, torch.float32)
        _check_aligned("workspace", workspace)
        if like.batch:
            like.launch(
                "tree_attention_bwd",
                **inputs,
                **arguments,
                plan=plan.argument(context_only),
                dq_rows=dq_rows,
                weights=address,
                slots=plan.slots,
                partials=address + 4 * self._weight_floats(like.batch, heads),
                n_partials=plan.n_partials,
            )

    def _weight_floats(self, batch: int, heads: int) -> int:
        """Two for each slot; the partial sums that follow are aligned."""
        unit = _ALIGNMENT // 4
        return -(-2 * batch * heads * self.plan.slots // unit) * unit

    def _check_queries(self, name: str, rows: Tensor, heads: int) -> _Like:
        """What all tensors of a call have in common, from one that has the queries' rows."""
        _require(rows.ndim == 3, f"`{name}` must have shape (B, rows, d), got {tuple(rows.shape)}")
        like = _Like.of(name, rows)
        _require(
            rows.device == self.plan.path.device,
            f"`{name}` is on {rows.device}, the plan on {self.plan.path.device}",
        )
        _require(
            heads >= 1 and like.width % heads == 0, f"`heads` must divide the width {like.width}, got {heads}"
        )
        head_size, most = like.width // heads, CUDA.load().MAX_HEAD_SIZE
        _require(
            head_size % 8 == 0 and head_size <= most,
            f"heads of {head_size} numbers: the CUDA kernels take multiples of 8 up to {most}",
        )
        return like

    def _inputs(
        self,
        q: ImageRows,
        k: ImageRows,
        v: ImageRows,
        sos_k: Tensor,
        sos_v: Tensor,
        heads: int,
        like: _Like,
    ) -> dict[str, object]:
        if self.all_rows:
            queries = self._split("q", q, like)
        else:
            _require(
                isinstance(q, Tensor),
                "`q` must be one (B, Q, d) tensor: the context rows have no queries here",
            )
            assert isinstance(q, Tensor)
            queries = (_NO_ROWS, _rows("q", q, like, like.batch, self.plan.n_queries))
        for name, sos in (("sos_k", sos_k), ("sos_v", sos_v)):
            _require(
                sos.numel() == like.width, f"`{name}` must have {like.width} numbers, got {tuple(sos.shape)}"
            )
            _dense(name, sos, tuple(sos.shape), like, like.dtype)
            _check_aligned(name, sos)
        return {
            "dtype": _DTYPES[like.dtype],
            "batch": like.batch,
            "heads": heads,
            "head_size": like.width // heads,
            "q": queries,
            "k": self._split("k", k, like),
            "v": self._split("v", v, like),
            "sos_k": sos_k.data_ptr(),
            "sos_v": sos_v.data_ptr(),
        }

    def _split(self, name: str, rows: ImageRows, like: _Like) -> tuple[_Rows, _Rows]:
        """The context and the node rows of every image."""
        m, n = self.plan.n_ctx, self.plan.n_nodes
        if isinstance(rows, Tensor):
            data, image_stride, row_stride = _rows(name, rows, like, like.batch, m + n)
            nodes = data + m * row_stride * rows.element_size()
            return (data, image_stride, row_stride), (nodes, image_stride, row_stride)
        parts = []
        for part, count, kind in zip(rows, (m, n), ("ctx", "node"), strict=True):
            part = part[None] if part.ndim == 2 else part
            shared = part.ndim == 3 and len(part) == 1
            found = _rows(f"{name}_{kind}", part, like, 1 if shared else like.batch, count)
            parts.append((found[0], 0, found[2]) if shared else found)
        return parts[0], parts[1]


def tree_attention(tree: ClassTree, queries: Tensor | None, device: torch.device) -> TreeAttention:
    return TreeAttention(tree, queries, device)


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
    _require(x.ndim == 3, f"`x` must have shape (B, M, d), got {tuple(x.shape)}")
    like = _Like.of("x", x)
    m, d = x.shape[1:]
    _require(m >= 1, f"`x` must have at least one context row, got {tuple(x.shape)}")
    most: int = CUDA.load().MAX_WIDTH
    _require(d <= most, f"`x` must have rows of at most {most} numbers, got {d}")
    _require(eps >= 0, f"`eps` must not be negative, got {eps}")
    arguments = {
        "vectors": _NO_ARRAY if vectors is None else _array("vectors", vectors, (m, d), like),
        **_shift("shift", shift, m, like),
        "position": _array("position", position, (m, d), like),
        "gamma": _array("gamma", gamma, (d,), like),
        "beta": _array("beta", beta, (d,), like),
        "x": _rows("x", x, like, like.batch, m, written=True, aligned=False),
        "y": _rows("y", y, like, like.batch, m, written=True, aligned=False),
        "mean": _dense("mean", mean, (like.batch * m,), like, torch.float32),
        "rstd": _dense("rstd", rstd, (like.batch * m,), like, torch.float32),
    }
    if like.batch:
        like.launch(
            "assemble_prompts_fwd",
            **arguments,
            dtype=_DTYPES[like.dtype],
            batch=like.batch,
            n_ctx=m,
            d=d,
            eps=eps,
        )


def assemble_prompts_bwd(dx: Tensor, d_vectors: Tensor | None, d_shift: Tensor) -> None:
    _require(dx.ndim == 3, f"`dx` must have shape (B, M, d), got {tuple(dx.shape)}")
    like = _Like.of("dx", dx)
    m, d = dx.shape[1:]
    like.launch(
        "assemble_prompts_bwd",
        dx=_rows("dx", dx, like, like.batch, m, aligned=False),
        d_vectors=_NO_ARRAY if d_vectors is None else _array("d_vectors", d_vectors, (m, d), like),
        **_shift("d_shift", d_shift, m, like),
        dtype=_DTYPES[like.dtype],
        batch=like.batch,
        n_ctx=m,
        d=d,
    )


def assemble_dense(context: Tensor, prefix: Tensor, suffix: Tensor, out: Tensor) -> None:
    _require(context.ndim == 3, f"`context` must have shape (B, M, d), got {tuple(context.shape)}")
    _require(suffix.ndim == 3, f"`suffix` must have shape (K, L - 1 - M, d), got {tuple(suffix.shape)}")
    like = _Like.of("context", context)
    batch, m, d = context.shape
    classes, length = len(suffix), 1 + m + suffix.shape[1]
    addresses = {
        "context": _dense("context", context, (batch, m, d), like, like.dtype),
        "prefix": _dense("prefix", prefix, (classes, d), like, like.dtype),
        "suffix": _dense("suffix", suffix, (classes, length - 1 - m, d), like, like.dtype),
        "out": _dense("out", out, (batch, classes, length, d), like, like.dtype),
    }
    if out.numel():
        like.launch(
            "assemble_dense",
            **addresses,
            batch=batch,
            n_classes=classes,
            n_ctx=m,
            length=length,
            row_bytes=d * context.element_size(),
        )


@dataclass(frozen=True)
class _Like:
    """What the tensors of a call have in common."""

    batch: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, name: str, rows: Tensor) -> _Like:
        """From rows (B, rows, d)."""
        extension = CUDA.load()
        device_type: str = extension.DEVICE_TYPE
        _require(
            rows.device.type == device_type and rows.dtype in _DTYPES,
            f"The CUDA kernels take float16, bfloat16 and float32 tensors on a {device_type} device; "
            f"`{name}` is {rows.dtype} on {rows.device}",
        )
        _require(rows.shape[2] >= 1, f"`{name}` must have rows of at least one number")
        most: int = extension.MAX_GRID
        _require(len(rows) <= most, f"`{name}` must have at most {most} images, got {len(rows)}")
        return cls(len(rows), rows.shape[2], rows.dtype, rows.device)

    def launch(self, name: str, **arguments: object) -> None:
        """Call a launcher of the extension on this device and torch's current stream there."""
        launcher = getattr(CUDA.load(), name)
        if self.device.type != "cuda":
            launcher(**arguments, stream=0)
            return
        with torch.cuda.device(self.device):
            launcher(**arguments, stream=torch.cuda.current_stream().cuda_stream)


_Rows = tuple[int, int, int]  # address, strides of an image and of a row
_NO_ROWS: _Rows = (0, 0, 0)
_NO_ARRAY = (0, _DTYPES[torch.float32])


def _rows(
    name: str,
    tensor: Tensor,
    like: _Like,
    batch: int,
    rows: int,
    *,
    written: bool = False,
    aligned: bool = True,
) -> _Rows:
    """(B, rows, d), its last dimension contiguous. aligned: its rows are where 16 bytes can be loaded at a time."""
    shape = (batch, rows, like.width)
    _require(tuple(tensor.shape) == shape, f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")
    _check_kind(name, tensor, like, like.dtype)
    # The stride of a single element is arbitrary.
    image_stride, row_stride, stride = (
        step if size > 1 else 0 for step, size in zip(tensor.stride(), shape, strict=True)
    )
    _require(
        like.width == 1 or stride == 1,
        f"`{name}` must be contiguous in its last dimension, got strides {tensor.stride()}",
    )
    if written and tensor.numel():
        extent = like.width
        for step, size in sorted([(image_stride, batch), (row_stride, rows)]):
            _require(
                size == 1 or step >= extent,
                f"`{name}` must have rows that do not overlap, got strides {tensor.stride()}",
            )
            extent += step * (size - 1)
    if aligned:
        _check_aligned(name, tensor, image_stride, row_stride)
    return tensor.data_ptr(), image_stride, row_stride


def _shift(name: str, shift: Tensor, m: int, like: _Like) -> dict[str, object]:
    """(B, d), or (B, M, d): a row for each context vector."""
    of_row = shift.ndim == 3
    shape = (like.batch, m, like.width) if of_row else (like.batch, like.width)
    return {name: _array(name, shift, shape, like), "shift_of_row": of_row}


def _array(name: str, tensor: Tensor, shape: tuple[int, ...], like: _Like) -> tuple[int, int]:
    """A contiguous array of any of the types."""
    _require(tensor.dtype in _DTYPES, f"`{name}` must be float16, bfloat16 or float32, got {tensor.dtype}")
    return _dense(name, tensor, shape, like, tensor.dtype), _DTYPES[tensor.dtype]


def _dense(name: str, tensor: Tensor, shape: tuple[int, ...], like: _Like, dtype: torch.dtype) -> int:
    _require(tuple(tensor.shape) == shape, f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")
    _require(tensor.is_contiguous(), f"`{name}` must be contiguous, got strides {tensor.stride()}")
    _check_kind(name, tensor, like, dtype)
    return tensor.data_ptr()


def _check_kind(name: str, tensor: Tensor, like: _Like, dtype: torch.dtype) -> None:
    _require(
        tensor.dtype == dtype and tensor.device == like.device,
        f"`{name}` must be {dtype} on {like.device}, got {tensor.dtype} on {tensor.device}",
    )


def _check_aligned(name: str, tensor: Tensor, *strides: int) -> None:
    unit = _ALIGNMENT // tensor.element_size()
    _require(
        tensor.data_ptr() % _ALIGNMENT == 0 and all(stride % unit == 0 for stride in strides),
        f"`{name}` must have rows at multiples of {_ALIGNMENT} bytes, "
        f"got an offset of {tensor.storage_offset()} numbers and strides {tensor.stride()}",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
