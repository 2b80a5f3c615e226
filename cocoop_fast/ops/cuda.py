"""Launchers of the CUDA C++ kernels, as :mod:`cocoop_fast.ops.cpu` has them; the rest of the table is Triton's.

Tensors are on one CUDA device; results are written into tensors of the caller, on torch's current stream, and nothing
waits for the device or allocates. "Rows" are tensors whose last dimension is contiguous. Everything is checked before
a kernel runs: a wrong shape, dtype, device or address raises ValueError.

Shapes: B images, K classes, N tree nodes, M context tokens, R = M + N rows of an image, Q queries, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.cuda_extension import load_cuda_extension
from cocoop_fast.prompts.tree import ClassTree

__all__ = ["ImageRows", "TreeAttention", "assemble_dense", "assemble_prompts_bwd", "assemble_prompts_fwd"]

# The rows of an image: one (B, R, d) tensor, or its context and node rows apart, (B, M, d) and (B, N, d). Either part
# may also be (1, rows, d) or (rows, d): the same for every image.
ImageRows = Tensor | tuple[Tensor, Tensor]

# The types of rows, and the numbers that the extension knows them by.
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}

# Query rows that a warp sums towards a key's gradient: fewer, and the partial sums cost more than they save; more, and
# the warps of the keys that all rows read are still at work when the others are done.
_READERS_PER_TASK = 64

_ALIGNMENT = 16  # bytes, of a load


class TreeAttention:
    """The attention of a class tree: which keys each row reads, planned once.

    Args:
        tree: the class tree, of the standard shape.
        queries: None if all R rows ask; else the strictly ascending nodes that alone ask, (Q,).
        device: where the tensors of the calls are.

    Raises:
        ValueError: the queries are no ascending nodes of the tree.
    """

    def __init__(
        self, tree: ClassTree, queries: Tensor | None = None, device: torch.device | str = "cuda"
    ) -> None:
        self.all_rows = queries is None
        self.plan = _Plan.of(tree, queries, torch.device(device))

    def workspace(self, batch: int, heads: int, head_size: int) -> Tensor:
        """A new workspace for :meth:`backward`; any larger one serves as well."""
        return torch.empty(
            self.workspace_floats(batch, heads, head_size), device=self.plan.path.device, dtype=torch.float32
        )

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        """Two numbers for each slot, and the partial sums of the keys that many rows read."""
        return self._weight_floats(batch, heads) + batch * self.plan.n_partials * 2 * heads * head_size

    def forward(
        self,
        q: ImageRows,
        k: ImageRows,
        v: ImageRows,
        sos_k: Tensor,
        sos_v: Tensor,
        heads: int,
        o: Tensor,
    ) -> None:
        """o = softmax(q k / sqrt(d / heads)) v, over the keys that each row reads.

        Args:
            q: rows of the image; with queries their rows alone, (B, Q, d).
            k, v: rows of the image.
            sos_k, sos_v: key and value of the start-of-text token, d numbers each.
            heads: H, dividing d; d / H is a multiple of 8 and at most 128.
            o: (B, R, d) or (B, Q, d), written.

        Raises:
            ValueError: see the module.
        """
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
        """dq, dk, dv = the gradients of q, k, v. The same bits every time.

        Args:
            grad_o: as `o`.
            q, k, v, sos_k, sos_v, heads: as in :meth:`forward`.
            dq: as `o`, written; (B, M, d) with `context_only`, and None with queries as well.
            dk, dv: (B, R, d), written; (B, M, d) with `context_only`.
            workspace: (n,) fp32 with n >= workspace_floats(B, heads, d / heads); its content does not matter.
            context_only: only the gradients of the context rows are wanted.

        Raises:
            ValueError: see the module.
        """
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
        head_size, most = like.width // heads, load_cuda_extension().MAX_HEAD_SIZE
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


def assemble_prompts_fwd(
    ctx: Tensor,
    bias: Tensor,
    position: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """x[b, m] = ctx[m] + bias[b] + position[m], y = LN(x), in one pass. LN is that of x as it is stored.

    Args:
        ctx, position: (M, d), d <= 8192. These and the next three may be of other types: the sum is in fp32.
        bias: (B, d).
        gamma, beta: (d,).
        eps: LayerNorm's epsilon.
        x, y: rows (B, M, d), written.
        mean, rstd: (B * M,) fp32, written.

    Raises:
        ValueError: see the module.
    """
    _require(x.ndim == 3, f"`x` must have shape (B, M, d), got {tuple(x.shape)}")
    like = _Like.of("x", x)
    m, d = x.shape[1:]
    _require(m >= 1, f"`x` must have at least one context row, got {tuple(x.shape)}")
    most: int = load_cuda_extension().MAX_WIDTH
    _require(d <= most, f"`x` must have rows of at most {most} numbers, got {d}")
    _require(eps >= 0, f"`eps` must not be negative, got {eps}")
    arguments = {
        "ctx": _array("ctx", ctx, (m, d), like),
        "bias": _array("bias", bias, (like.batch, d), like),
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


def assemble_prompts_bwd(dx: Tensor, d_ctx: Tensor, d_bias: Tensor) -> None:
    """d_ctx[m] = sum_b dx[b, m], d_bias[b] = sum_m dx[b, m], in ascending order, in fp32 until they are stored.

    Args:
        dx: rows (B, M, d).
        d_ctx: (M, d), written.
        d_bias: (B, d), written.

    Raises:
        ValueError: see the module.
    """
    _require(dx.ndim == 3, f"`dx` must have shape (B, M, d), got {tuple(dx.shape)}")
    like = _Like.of("dx", dx)
    m, d = dx.shape[1:]
    like.launch(
        "assemble_prompts_bwd",
        dx=_rows("dx", dx, like, like.batch, m, aligned=False),
        d_ctx=_array("d_ctx", d_ctx, (m, d), like),
        d_bias=_array("d_bias", d_bias, (like.batch, d), like),
        dtype=_DTYPES[like.dtype],
        batch=like.batch,
        n_ctx=m,
        d=d,
    )


def assemble_dense(context: Tensor, prefix: Tensor, suffix: Tensor, out: Tensor) -> None:
    """out[b, k] = prefix[k], context[b], suffix[k].

    Args:
        context: (B, M, d).
        prefix: (K, d).
        suffix: (K, L - 1 - M, d).
        out: (B, K, L, d) in the dtype of the three, written.

    Raises:
        ValueError: see the module.
    """
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


@dataclass(frozen=True, eq=False)
class _Plan:
    """AttentionPlan of csrc/cuda/kernels.h: who reads whose key, as int32 tensors on the device.

    The query rows that read a key are a contiguous range, that of its descendants, and so are the chunks of at most
    _READERS_PER_TASK into which the range is cut.
    """

    n_ctx: int
    n_nodes: int
    n_ctx_queries: int  # M, or 0 when only some nodes ask
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
    def of(cls, tree: ClassTree, queries: Tensor | None, device: torch.device) -> _Plan:
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
        parts = np.maximum(1, -(-(end - begin) // _READERS_PER_TASK))

        first_partial = np.cumsum(np.where(parts > 1, parts, 0)) - np.where(parts > 1, parts, 0)
        key = np.repeat(np.arange(m + n), parts)
        part = np.arange(len(key)) - np.repeat(np.cumsum(parts) - parts, parts)
        task_begin = begin[key] + part * _READERS_PER_TASK
        task_end = np.minimum(end[key], task_begin + _READERS_PER_TASK)
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
    _require(
        nodes.ndim == 1 and nodes.dtype.kind == "i", f"`queries` must be (Q,) integers, got {queries.dtype}"
    )
    outside = (nodes < 0) | (nodes >= n_nodes)
    _require(not outside.any(), f"`queries` must be nodes 0 .. {n_nodes - 1}, got {nodes[outside][:1]}")
    _require(bool((np.diff(nodes) > 0).all()), "`queries` must be strictly ascending")
    return nodes


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
        extension = load_cuda_extension()
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
        launcher = getattr(load_cuda_extension(), name)
        if self.device.type != "cuda":
            launcher(**arguments, stream=0)
            return
        with torch.cuda.device(self.device):
            launcher(**arguments, stream=torch.cuda.current_stream().cuda_stream)


_Rows = tuple[int, int, int]  # address, strides of an image and of a row
_NO_ROWS: _Rows = (0, 0, 0)


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
