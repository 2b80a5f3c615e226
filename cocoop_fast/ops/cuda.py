"""The operations of :mod:`cocoop_fast.ops.table` on NVIDIA GPUs: attention and assembly by CUDA C++ kernels, the rest by
Triton's.

Tensors are on one CUDA device; work is launched on torch's current stream, and nothing waits for the device. Rows that
attention reads lie at multiples of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.kernels.rows import STORAGE_TYPES, check_array
from cocoop_fast.ops import triton
from cocoop_fast.ops.cuda_plan import AttentionPlan
from cocoop_fast.ops.extensions import CUDA
from cocoop_fast.ops.table import AttentionInputs, ImageRows
from cocoop_fast.prompts.tree import ClassTree

PANEL_ROWS = triton.PANEL_ROWS
ROW_PADDING = triton.ROW_PADDING

frozen_linear = triton.frozen_linear
packed_bytes = triton.packed_bytes
layer_norm_fwd = triton.layer_norm_fwd
layer_norm_bwd = triton.layer_norm_bwd
activation_fwd = triton.activation_fwd
activation_bwd = triton.activation_bwd
known_arguments = triton.known_arguments
record = None  # a CUDA graph does that
gather_rows = triton.gather_rows
add_rows = triton.add_rows
head_fwd = triton.head_fwd
head_bwd = triton.head_bwd
cross_entropy_fwd = triton.cross_entropy_fwd
cross_entropy_bwd = triton.cross_entropy_bwd

# The numbers that the extension knows the types of rows by.
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

    def forward(self, inputs: AttentionInputs, o: Tensor) -> None:
        like = self._check_queries("o", o, inputs[-1])
        read = self._inputs(inputs, like)
        rows = _rows("o", o, like, like.batch, self.plan.n_queries, written=True)
        if like.batch:
            like.launch("tree_attention_fwd", **read, plan=self.plan.argument(), o=rows)

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
        plan, heads = self.plan, inputs[-1]
        like = self._check_queries("grad_o", grad_o, heads)
        read = self._inputs(inputs, like)
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
        check_array("workspace", workspace, tuple(workspace.shape), grad_o, torch.float32)
        _check_aligned("workspace", workspace)
        address = workspace.data_ptr()
        if like.batch:
            like.launch(
                "tree_attention_bwd",
                **read,
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

    def _inputs(self, inputs: AttentionInputs, like: _Like) -> dict[str, Any]:
        q, k, v, sos_k, sos_v, heads = inputs
        if self.all_rows:
            queries = self._split("q", q, like)
        elif isinstance(q, Tensor):
            queries = (_NO_ROWS, _rows("q", q, like, like.batch, self.plan.n_queries))
        else:
            raise ValueError("`q` must be one (B, Q, d) tensor: the context rows have no queries here")
        for name, sos in (("sos_k", sos_k), ("sos_v", sos_v)):
            _require(
                sos.numel() == like.width, f"`{name}` must have {like.width} numbers, got {tuple(sos.shape)}"
            )
            check_array(name, sos, tuple(sos.shape), like.rows, like.dtype)
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
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check_array(name, statistic, (like.batch * m,), x, torch.float32)
    arguments = {
        **_prompts("", vectors, shift, m, like),
        "position": _array("position", position, (m, d), like),
        "gamma": _array("gamma", gamma, (d,), like),
        "beta": _array("beta", beta, (d,), like),
        "x": _rows("x", x, like, like.batch, m, written=True, aligned=False),
        "y": _rows("y", y, like, like.batch, m, written=True, aligned=False),
    }
    if like.batch:
        like.launch("assemble_prompts_fwd", **arguments, mean=mean.data_ptr(), rstd=rstd.data_ptr(), eps=eps)


def assemble_prompts_bwd(dx: Tensor, d_vectors: Tensor | None, d_shift: Tensor) -> None:
    _require(dx.ndim == 3, f"`dx` must have shape (B, M, d), got {tuple(dx.shape)}")
    like = _Like.of("dx", dx)
    m = dx.shape[1]
    rows = _rows("dx", dx, like, like.batch, m, aligned=False)
    like.launch("assemble_prompts_bwd", dx=rows, **_prompts("d_", d_vectors, d_shift, m, like))


def _prompts(prefix: str, vectors: Tensor | None, shift: Tensor, m: int, like: _Like) -> dict[str, Any]:
    """Vectors (M, d), or none, and their shift: (B, d), or (B, M, d), a row for each."""
    of_row = shift.ndim == 3
    shape = (like.batch, m, like.width) if of_row else (like.batch, like.width)
    return {
        f"{prefix}vectors": _array(f"{prefix}vectors", vectors, (m, like.width), like),
        f"{prefix}shift": _array(f"{prefix}shift", shift, shape, like),
        "shift_of_row": of_row,
        "dtype": _DTYPES[like.dtype],
        "batch": like.batch,
        "n_ctx": m,
        "d": like.width,
    }


def assemble_dense(context: Tensor, prefix: Tensor, suffix: Tensor, out: Tensor) -> None:
    _require(context.ndim == 3, f"`context` must have shape (B, M, d), got {tuple(context.shape)}")
    _require(suffix.ndim == 3, f"`suffix` must have shape (K, L - 1 - M, d), got {tuple(suffix.shape)}")
    like = _Like.of("context", context)
    batch, m, d = context.shape
    classes, length = len(suffix), 1 + m + suffix.shape[1]
    parts = {
        "context": (context, (batch, m, d)),
        "prefix": (prefix, (classes, d)),
        "suffix": (suffix, (classes, length - 1 - m, d)),
        "out": (out, (batch, classes, length, d)),
    }
    for name, (tensor, shape) in parts.items():
        check_array(name, tensor, shape, context, like.dtype)
    if out.numel():
        like.launch(
            "assemble_dense",
            **{name: tensor.data_ptr() for name, (tensor, _) in parts.items()},
            batch=batch,
            n_classes=classes,
            n_ctx=m,
            length=length,
            row_bytes=d * context.element_size(),
        )


@dataclass(frozen=True)
class _Like:
    """What the tensors of a call have in common."""

    rows: Tensor  # one of them, (B, rows, d)
    batch: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, name: str, rows: Tensor) -> _Like:
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
        return cls(rows, len(rows), rows.shape[2], rows.dtype, rows.device)

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
    _require(
        tensor.dtype == like.dtype and tensor.device == like.device,
        f"`{name}` must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}",
    )
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


def _array(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: _Like) -> tuple[int, int]:
    """A contiguous array of any of the types, or none."""
    if tensor is None:
        return _NO_ARRAY
    check_array(name, tensor, shape, like.rows, *STORAGE_TYPES)
    return tensor.data_ptr(), _DTYPES[tensor.dtype]


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
