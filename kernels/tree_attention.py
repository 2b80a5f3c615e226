"""Attention over the rows of a class tree, forward and backward.

One program owns a (tile, head, image): at most 16 rows that ask, and the keys that they see, 32 at a time; see
tree_attention_plan.py. Query, key and value are read where the GEMM wrote them, a key by its row number.

Memory traffic a row of d numbers of s bytes: forward 4 d s (q, k, v in, o out) and what neighbouring tiles share: the
1 + M rows of SOS and context and the open ancestors, read by each tile, mostly out of the L2 cache. Backward 7 d s (q,
k, v, grad o in; dq, dk, dv out), and for the context and open ancestors of each tile a partial of 8 d bytes, written and
read once. Predicted: below a thousand rows the time of a launch; above, bound by the latency of one gather, two
products and a softmax in a row, of which 16 to 32 run on a multiprocessor at a time: half of the bandwidth.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import STORAGE_TYPES, check_array, check_rows
from .tree_attention_plan import QUERIES, SLOTS, AttentionPlan, Tree, plan_attention
from .variants import STORAGE, Variant

# The rows of an image: one (B, R, d) tensor, or its context and node rows apart, (B, M, d) and (B, N, d). Either part
# may also be (1, rows, d) or (rows, d): the same for every image.
ImageRows = Tensor | tuple[Tensor, Tensor]
AttentionInputs = tuple[ImageRows, ImageRows, ImageRows, Tensor, Tensor, int]  # q, k, v, sos_k, sos_v, heads

# Columns of a head that a program holds: the narrowest block that takes its size.
HEAD_BLOCKS = (32, 64, 128)
# Bytes of such a block -> warps in forward, in backward with one chunk a tile, and with more: the fewest whose registers
# hold everything on every target.
WARPS = {64: (1, 2, 2), 128: (1, 4, 4), 256: (4, 8, 4), 512: (8, 8, 8)}

# Partials are summed in blocks of so many partials and columns.
SUM_PARTIALS, SUM_COLUMNS, SUM_WARPS = 32, 64, 4

# Of bf16 the interpreter multiplies the bits as integers, and it cuts off instead of rounding: it gets wider operands.
_WIDEN_BF16 = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _operand(x, like):
    """x in the type of the other operand."""
    if _WIDEN_BF16 and like.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x.to(like.dtype)


@triton.jit
def _dot(a, b):
    """a b in fp32; fp32 operands are not rounded to TF32."""
    return tl.dot(_operand(a, a), _operand(b, b), input_precision="ieee")


@triton.jit
def _row_pointers(row, columns, n_ctx, ctx, stride_ctx, node, stride_node):
    """(rows, columns) pointers into rows that lie in two tensors, the first n_ctx in one, the others in another."""
    row, columns = row[:, None], columns[None, :]
    in_ctx = ctx + row.to(tl.int64) * stride_ctx + columns
    in_node = node + (row - n_ctx).to(tl.int64) * stride_node + columns
    # The columns are in before the choice: a choice between rows alone would hide that neighbours can be loaded at once.
    return tl.where(row < n_ctx, in_ctx, in_node)


@triton.jit
def _load_slots(row, n_ctx, sos, ctx, stride_ctx, node, stride_node, columns, inside):
    """(KEYS, BLOCK_D) keys or values of the rows; of SOS for row -1."""
    of_rows = _row_pointers(row, columns, n_ctx, ctx, stride_ctx, node, stride_node)
    of_sos = sos + tl.zeros_like(row)[:, None] + columns[None, :]
    pointers = tl.where(row[:, None] < 0, of_sos, of_rows)
    return tl.load(pointers, mask=inside[None, :], other=0.0)


@triton.jit
def _scores(
    q, k, visible, begin, scale, QUERIES: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """(QUERIES, KEYS) log2(e) q k / sqrt(D), and -inf for the keys that a query does not see."""
    words = tl.load(visible + begin // SLOTS * QUERIES + tl.arange(0, QUERIES))
    seen = (words[:, None] >> (begin % SLOTS + tl.arange(0, KEYS))[None, :]) & 1
    return tl.where(seen == 1, _dot(q, tl.trans(k)) * (scale * 1.4426950408889634), float("-inf"))


@triton.jit(do_not_specialize=["q_ctx_rows", "n_ctx", "heads"])
def _tree_attention_fwd_kernel(
    q_ctx,
    q_node,
    k_ctx,
    k_node,
    v_ctx,
    v_node,
    sos_k,
    sos_v,
    o,
    tile_query,
    tile_chunk,
    slot_row,
    visible,
    q_ctx_rows,  # M where all rows ask, 0 where the queries are rows of q_node alone
    n_ctx,
    heads,
    scale,
    stride_q_ctx_b,
    stride_q_ctx_r,
    stride_q_node_b,
    stride_q_node_r,
    stride_k_ctx_b,
    stride_k_ctx_r,
    stride_k_node_b,
    stride_k_node_r,
    stride_v_ctx_b,
    stride_v_ctx_r,
    stride_v_node_b,
    stride_v_node_r,
    stride_ob,
    stride_or,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD_SIZE
    columns += head * HEAD_SIZE
    k_ctx += image * stride_k_ctx_b
    k_node += image * stride_k_node_b
    v_ctx += image * stride_v_ctx_b
    v_node += image * stride_v_node_b

    query = tl.load(tile_query + tile) + tl.arange(0, QUERIES)
    asks = (query < tl.load(tile_query + tile + 1))[:, None] & inside[None, :]
    q_pointers = _row_pointers(
        query, columns, q_ctx_rows,
        q_ctx + image * stride_q_ctx_b, stride_q_ctx_r, q_node + image * stride_q_node_b, stride_q_node_r,
    )  # fmt: skip
    q = tl.load(q_pointers, mask=asks, other=0.0)

    # Softmax some keys at a time. The first are with SOS, which every query sees: from there on `highest` is finite.
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for begin in range(tl.load(tile_chunk + tile) * SLOTS, tl.load(tile_chunk + tile + 1) * SLOTS, KEYS):
        slot = begin + tl.arange(0, KEYS)
        row = tl.load(slot_row + slot)
        k = _load_slots(row, n_ctx, sos_k, k_ctx, stride_k_ctx_r, k_node, stride_k_node_r, columns, inside)
        v = _load_slots(row, n_ctx, sos_v, v_ctx, stride_v_ctx_r, v_node, stride_v_node_r, columns, inside)
        scores = _scores(q, k, visible, begin, scale, QUERIES, SLOTS, KEYS)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, axis=1)
        result = result * fade[:, None] + _dot(_operand(weights, v), v)
        highest = higher

    o_pointers = o + image * stride_ob + query.to(tl.int64) * stride_or
    tl.store(o_pointers[:, None] + columns[None, :], result / total[:, None], mask=asks)


@triton.jit
def _slot_gradients(
    weights, d_scores, q, d_o, k, row, slot, image, rows_written, n_partials, width,
    slot_partial, partials, dk, dv, stride_dkr, stride_dvr, columns, inside,
):  # fmt: skip
    """Stores dk = d_scores^T q and dv = weights^T d_o of these slots; returns dq = d_scores k."""
    d_scores = _operand(d_scores, q)
    partial = tl.load(slot_partial + slot)
    wanted = (row >= 0) & (row < rows_written)
    own = (wanted & (partial < 0))[:, None] & inside[None, :]
    shared = (wanted & (partial >= 0))[:, None] & inside[None, :]
    at_row, at_column = row.to(tl.int64)[:, None], columns[None, :]
    # (B, P, 2, d): the partials of k, then those of v
    at_partial = (image * n_partials + partial.to(tl.int64))[:, None] * (2 * width) + at_column

    slot_dk = _dot(tl.trans(d_scores), q)
    tl.store(dk + at_row * stride_dkr + at_column, slot_dk, mask=own)
    tl.store(partials + at_partial, slot_dk, mask=shared)
    slot_dv = _dot(tl.trans(_operand(weights, d_o)), d_o)
    tl.store(dv + at_row * stride_dvr + at_column, slot_dv, mask=own)
    tl.store(partials + at_partial + width, slot_dv, mask=shared)
    return _dot(d_scores, k)


@triton.jit(
    do_not_specialize=[
        "q_ctx_rows",
        "n_ctx",
        "heads",
        "queries_written",
        "rows_written",
        "n_partials",
        "width",
    ]
)
def _tree_attention_bwd_kernel(
    d_o,
    q_ctx,
    q_node,
    k_ctx,
    k_node,
    v_ctx,
    v_node,
    sos_k,
    sos_v,
    dq,
    dk,
    dv,
    partials,
    tile_query,
    tile_chunk,
    slot_row,
    slot_partial,
    visible,
    q_ctx_rows,
    n_ctx,
    heads,
    scale,
    queries_written,  # dq is wanted of the queries before this one,
    rows_written,  # dk and dv of the rows before this one
    n_partials,
    width,
    stride_dob,
    stride_dor,
    stride_q_ctx_b,
    stride_q_ctx_r,
    stride_q_node_b,
    stride_q_node_r,
    stride_k_ctx_b,
    stride_k_ctx_r,
    stride_k_node_b,
    stride_k_node_r,
    stride_v_ctx_b,
    stride_v_ctx_r,
    stride_v_node_b,
    stride_v_node_r,
    stride_dqb,
    stride_dqr,
    stride_dkb,
    stride_dkr,
    stride_dvb,
    stride_dvr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD_SIZE
    columns += head * HEAD_SIZE
    k_ctx += image * stride_k_ctx_b
    k_node += image * stride_k_node_b
    v_ctx += image * stride_v_ctx_b
    v_node += image * stride_v_node_b
    dk += image * stride_dkb
    dv += image * stride_dvb

    query = tl.load(tile_query + tile) + tl.arange(0, QUERIES)
    in_tile = query < tl.load(tile_query + tile + 1)
    asks = in_tile[:, None] & inside[None, :]
    q_pointers = _row_pointers(
        query, columns, q_ctx_rows,
        q_ctx + image * stride_q_ctx_b, stride_q_ctx_r, q_node + image * stride_q_node_b, stride_q_node_r,
    )  # fmt: skip
    q = tl.load(q_pointers, mask=asks, other=0.0)
    d_o_pointers = d_o + image * stride_dob + query.to(tl.int64) * stride_dor
    d_o_rows = tl.load(d_o_pointers[:, None] + columns[None, :], mask=asks, other=0.0)

    # weights = softmax(scores), d_weights = d_o v^T, delta = sum_s weights d_weights,
    # d_scores = weights (d_weights - delta)
    first, end = tl.load(tile_chunk + tile) * SLOTS, tl.load(tile_chunk + tile + 1) * SLOTS
    if ONE_CHUNK:
        slot = first + tl.arange(0, KEYS)
        row = tl.load(slot_row + slot)
        k = _load_slots(row, n_ctx, sos_k, k_ctx, stride_k_ctx_r, k_node, stride_k_node_r, columns, inside)
        v = _load_slots(row, n_ctx, sos_v, v_ctx, stride_v_ctx_r, v_node, stride_v_node_r, columns, inside)
        scores = _scores(q, k, visible, first, scale, QUERIES, SLOTS, KEYS)
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        weights /= tl.sum(weights, axis=1)[:, None]
        d_weights = _dot(d_o_rows, tl.trans(v))
        delta = tl.sum(weights * d_weights, axis=1)
        d_q = _slot_gradients(
            weights, weights * (d_weights - delta[:, None]) * scale, q, d_o_rows, k, row, slot, image,
            rows_written, n_partials, width, slot_partial, partials, dk, dv, stride_dkr, stride_dvr,
            columns, inside,
        )  # fmt: skip
    else:
        # Once through the keys for the softmax's sum and delta, and once more for the gradients.
        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        delta = tl.zeros((QUERIES,), tl.float32)
        for begin in range(first, end, KEYS):
            slot = begin + tl.arange(0, KEYS)
            row = tl.load(slot_row + slot)
            k = _load_slots(
                row, n_ctx, sos_k, k_ctx, stride_k_ctx_r, k_node, stride_k_node_r, columns, inside
            )
            v = _load_slots(
                row, n_ctx, sos_v, v_ctx, stride_v_ctx_r, v_node, stride_v_node_r, columns, inside
            )
            scores = _scores(q, k, visible, begin, scale, QUERIES, SLOTS, KEYS)
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(weights, axis=1)
            delta = delta * fade + tl.sum(weights * _dot(d_o_rows, tl.trans(v)), axis=1)
            highest = higher
        delta /= total
        d_q = tl.zeros((QUERIES, BLOCK_D), tl.float32)
        for begin in range(first, end, KEYS):
            slot = begin + tl.arange(0, KEYS)
            row = tl.load(slot_row + slot)
            k = _load_slots(
                row, n_ctx, sos_k, k_ctx, stride_k_ctx_r, k_node, stride_k_node_r, columns, inside
            )
            v = _load_slots(
                row, n_ctx, sos_v, v_ctx, stride_v_ctx_r, v_node, stride_v_node_r, columns, inside
            )
            scores = _scores(q, k, visible, begin, scale, QUERIES, SLOTS, KEYS)
            weights = tl.exp2(scores - highest[:, None]) / total[:, None]
            d_weights = _dot(d_o_rows, tl.trans(v))
            d_q += _slot_gradients(
                weights, weights * (d_weights - delta[:, None]) * scale, q, d_o_rows, k, row, slot, image,
                rows_written, n_partials, width, slot_partial, partials, dk, dv, stride_dkr, stride_dvr,
                columns, inside,
            )  # fmt: skip

    dq_pointers = dq + image * stride_dqb + query.to(tl.int64) * stride_dqr
    tl.store(dq_pointers[:, None] + columns[None, :], d_q, mask=asks & (query < queries_written)[:, None])


@triton.jit(do_not_specialize=["n_partials"])
def _sum_partials_kernel(
    partials,
    summed_row,
    summed_start,
    dk,
    dv,
    n_partials,
    width,
    stride_dkb,
    stride_dkr,
    stride_dvb,
    stride_dvr,
    PARTIALS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program owns a block of columns of one row of one image, of dk and dv side by side (2 d columns)."""
    blocks = tl.cdiv(2 * width, COLUMNS)
    summed, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    image = tl.program_id(1).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    first, end = tl.load(summed_start + summed), tl.load(summed_start + summed + 1)
    total = tl.zeros((PARTIALS, COLUMNS), tl.float32)
    for begin in range(first, end, PARTIALS):
        partial = begin + tl.arange(0, PARTIALS)
        inside = (partial < end)[:, None] & (columns < 2 * width)[None, :]
        offset = (image * n_partials + partial.to(tl.int64)) * (2 * width)
        total += tl.load(partials + offset[:, None] + columns[None, :], mask=inside, other=0.0)
    gradient = tl.sum(total, axis=0)
    row = tl.load(summed_row + summed).to(tl.int64)
    of_k = columns < width
    of_v = (columns >= width) & (columns < 2 * width)
    tl.store(dk + image * stride_dkb + row * stride_dkr + columns, gradient, mask=of_k)
    tl.store(dv + image * stride_dvb + row * stride_dvr + (columns - width), gradient, mask=of_v)


class TreeAttention:
    """The attention of a class tree: which keys each row reads, planned once.

    Args:
        tree: the class tree.
        queries: None if all R rows ask; else the strictly ascending nodes that alone ask, (Q,).
        device: where the tensors of the calls are.

    Raises:
        ValueError: the queries are no ascending nodes of the tree.
    """

    def __init__(self, tree: Tree, queries: Tensor | None = None, device: torch.device | str = "cpu") -> None:
        self.all_rows = queries is None
        self.plan: AttentionPlan = plan_attention(tree, queries, device)

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        """Float32 numbers of :meth:`backward`'s workspace."""
        return self.plan.workspace_floats(batch, heads, head_size)

    def forward(self, inputs: AttentionInputs, o: Tensor) -> None:
        """o = softmax(q k / sqrt(d / heads)) v, over the keys that each row reads.

        Args:
            inputs: q, rows of the image, with queries their rows alone, (B, Q, d); k, v, rows of the image; sos_k,
                sos_v, key and value of the start-of-text token, d numbers each; heads, H, dividing d; d / H at most 128.
            o: (B, R, d) or (B, Q, d), written.

        Raises:
            ValueError: a tensor has another shape, dtype or device, or rows that are not contiguous.
        """
        batch = self._check_queries(o, "o", o)
        *rows, heads = inputs
        head_size, block = _head_block(o.shape[2], heads)
        pointers, strides = self._inputs(*rows, o)
        if not batch:
            return
        plan = self.plan
        with torch.cuda.device_of(o):
            _tree_attention_fwd_kernel[(plan.tiles * heads, batch)](
                *pointers, o, plan.tile_query, plan.tile_chunk, plan.slot_row, plan.visible,
                plan.n_ctx if self.all_rows else 0, plan.n_ctx, heads, head_size**-0.5,
                *strides, o.stride(0), o.stride(1),
                HEAD_SIZE=head_size, BLOCK_D=block, QUERIES=QUERIES, SLOTS=SLOTS, KEYS=SLOTS,
                num_warps=_warps(o.dtype, block)[0], num_stages=1,
            )  # fmt: skip

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
        """dq, dk, dv = the gradients of q, k, v. The same bits every time.

        Args:
            grad_o: as `o`.
            inputs: as in :meth:`forward`.
            dq: as `o`, written; (B, M, d) with `context_only`, and None with queries as well.
            dk, dv: (B, R, d), written; (B, M, d) with `context_only`.
            workspace: (n,) fp32 with n >= workspace_floats(B, heads, d / heads); its content does not matter.
            context_only: only the gradients of the context rows are wanted.

        Raises:
            ValueError: as :meth:`forward`.
        """
        plan = self.plan
        batch = self._check_queries(grad_o, "grad_o", grad_o)
        width = grad_o.shape[2]
        *read, heads = inputs
        head_size, block = _head_block(width, heads)
        pointers, strides = self._inputs(*read, grad_o)
        rows = plan.n_ctx if context_only else plan.rows
        _check_rows("dk", dk, (batch, rows, width), grad_o)
        _check_rows("dv", dv, (batch, rows, width), grad_o)
        queries = self._check_dq(dq, grad_o, context_only)
        needed = self.workspace_floats(batch, heads, head_size)
        check_array("workspace", workspace, tuple(workspace.shape), grad_o, torch.float32)
        if workspace.ndim != 1 or len(workspace) < needed:
            raise ValueError(f"`workspace` must have at least {needed} numbers, got {tuple(workspace.shape)}")
        if not batch:
            return
        dq = grad_o if dq is None else dq  # no query is written then
        dkv_strides = (dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1))
        with torch.cuda.device_of(grad_o):
            _tree_attention_bwd_kernel[(plan.tiles * heads, batch)](
                grad_o, *pointers, dq, dk, dv, workspace,
                plan.tile_query, plan.tile_chunk, plan.slot_row, plan.slot_partial, plan.visible,
                plan.n_ctx if self.all_rows else 0, plan.n_ctx, heads, head_size**-0.5,
                queries, rows, plan.partials, width,
                grad_o.stride(0), grad_o.stride(1), *strides, dq.stride(0), dq.stride(1), *dkv_strides,
                HEAD_SIZE=head_size, BLOCK_D=block, QUERIES=QUERIES, SLOTS=SLOTS,
                KEYS=_backward_keys(plan.one_chunk), ONE_CHUNK=plan.one_chunk,
                num_warps=_warps(grad_o.dtype, block)[1 if plan.one_chunk else 2], num_stages=1,
            )  # fmt: skip
            summed = plan.summed_context if context_only else len(plan.summed_row)
            if summed:
                _sum_partials_kernel[(summed * triton.cdiv(2 * width, SUM_COLUMNS), batch)](
                    workspace, plan.summed_row, plan.summed_start, dk, dv, plan.partials, width, *dkv_strides,
                    PARTIALS=SUM_PARTIALS, COLUMNS=SUM_COLUMNS, num_warps=SUM_WARPS, num_stages=1,
                )  # fmt: skip

    def _check_queries(self, rows: Tensor, name: str, like: Tensor) -> int:
        """B, of rows that belong to the queries."""
        if rows.ndim != 3:
            raise ValueError(f"`{name}` must have shape (B, rows, d), got {tuple(rows.shape)}")
        _check_rows(name, rows, (rows.shape[0], self.plan.queries, rows.shape[2]), like)
        return rows.shape[0]

    def _check_dq(self, dq: Tensor | None, grad_o: Tensor, context_only: bool) -> int:
        """How many of the queries have their gradient written."""
        if context_only and not self.all_rows:
            if dq is not None:
                raise ValueError("`dq` must be None: no context row is among the queries")
            return 0
        if dq is None:
            raise ValueError("`dq` must be a tensor, got None")
        queries = self.plan.n_ctx if context_only else self.plan.queries
        _check_rows("dq", dq, (grad_o.shape[0], queries, grad_o.shape[2]), grad_o)
        return queries

    def _inputs(
        self, q: ImageRows, k: ImageRows, v: ImageRows, sos_k: Tensor, sos_v: Tensor, like: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """q, k, v as context and node rows, SOS's key and value; the strides of an image and a row of the former."""
        width = like.shape[2]
        n_ctx, n_nodes = self.plan.n_ctx, self.plan.rows - self.plan.n_ctx
        if self.all_rows:
            parts = _split("q", q, n_ctx, n_nodes, like)
        elif isinstance(q, Tensor):
            _check_rows("q", q, tuple(like.shape), like)
            parts = [q, q]
        else:
            raise ValueError("`q` must be one (B, Q, d) tensor: the context rows have no queries here")
        parts += _split("k", k, n_ctx, n_nodes, like) + _split("v", v, n_ctx, n_nodes, like)
        sos = sos_k.flatten(), sos_v.flatten()
        for name, one in zip(("sos_k", "sos_v"), sos, strict=True):
            check_array(name, one, (width,), like, like.dtype)
        strides: list[int] = []
        for part in parts:  # what is the same for every image has a stride of zero
            strides += [0 if len(part) == 1 else part.stride(0), part.stride(1)]
        return (*parts, *sos), tuple(strides)


def _split(name: str, rows: ImageRows, n_ctx: int, n_nodes: int, like: Tensor) -> list[Tensor]:
    """Context and node rows, (B or 1, M, d) and (B or 1, N, d)."""
    batch, _, width = like.shape
    if isinstance(rows, Tensor):
        _check_rows(name, rows, (batch, n_ctx + n_nodes, width), like)
        return [rows[:, :n_ctx], rows[:, n_ctx:]]
    parts = []
    for part, count, kind in zip(rows, (n_ctx, n_nodes), ("ctx", "node"), strict=True):
        part = part[None] if part.ndim == 2 else part
        images = 1 if len(part) == 1 else batch
        _check_rows(f"{name}_{kind}", part, (images, count, width), like)
        parts.append(part)
    return parts


def _check_rows(name: str, rows: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise ValueError unless these are rows of this shape, of the dtype and on the device of `like`."""
    if tuple(rows.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(rows.shape)}")
    check_rows(name, rows, like)
    if rows.dtype != like.dtype:
        raise ValueError(f"`{name}` is {rows.dtype}, other arguments {like.dtype}")


def _head_block(width: int, heads: int) -> tuple[int, int]:
    """The head size and the columns that a program holds for it."""
    if heads < 1 or width % heads:
        raise ValueError(f"`heads` must divide the width {width}, got {heads}")
    head_size = width // heads
    for block in HEAD_BLOCKS:
        if head_size <= block:
            return head_size, block
    raise ValueError(f"heads of {head_size} numbers: the kernels take at most {max(HEAD_BLOCKS)}")


def _backward_keys(one_chunk: bool) -> int:
    """How many keys go together: with the loop's own registers there are too few for a whole chunk."""
    return SLOTS if one_chunk else SLOTS // 2


def _warps(dtype: torch.dtype, block: int) -> tuple[int, int, int]:
    """As WARPS has them."""
    return WARPS[block * dtype.itemsize]


def _variants() -> tuple[Variant, ...]:
    """The head sizes of CLIP's towers; a smaller head takes the block of the next."""
    ctx_node = [f"{name}_{part}" for name in "qkv" for part in ("ctx", "node")]
    strides = [f"stride_{name}_{of}" for name in ctx_node for of in "br"]
    plan = ("tile_query", "tile_chunk", "slot_row", "visible")
    found = []
    for dtype, storage in zip(STORAGE, STORAGE_TYPES, strict=True):
        rows = f"*{dtype}"
        inputs = dict.fromkeys((*ctx_node, "sos_k", "sos_v"), rows)
        sizes = {"q_ctx_rows": "i32", "n_ctx": "i32", "heads": "i32", "scale": "fp32"}
        forward = inputs | {"o": rows} | dict.fromkeys(plan, "*i32") | sizes
        forward |= dict.fromkeys((*strides, "stride_ob", "stride_or"), "i32")
        backward = {"d_o": rows} | inputs | dict.fromkeys(("dq", "dk", "dv"), rows) | {"partials": "*fp32"}
        backward |= dict.fromkeys((*plan[:3], "slot_partial", "visible"), "*i32") | sizes
        backward |= dict.fromkeys(("queries_written", "rows_written", "n_partials", "width"), "i32")
        written = [f"stride_{name}{of}" for name in ("dq", "dk", "dv") for of in "br"]
        backward |= dict.fromkeys(("stride_dob", "stride_dor", *strides, *written), "i32")
        for head_size in (32, 64, 80, 128):
            _, block = _head_block(head_size, 1)
            shape = {
                "HEAD_SIZE": head_size,
                "BLOCK_D": block,
                "QUERIES": QUERIES,
                "SLOTS": SLOTS,
                "KEYS": SLOTS,
            }
            name = f"D={head_size}"
            forward_warps, *backward_warps = _warps(storage, block)
            found.append(Variant(_tree_attention_fwd_kernel, name, dtype, forward, shape, forward_warps))
            for one_chunk, warps in zip((True, False), backward_warps, strict=True):
                found.append(
                    Variant(
                        _tree_attention_bwd_kernel, name + ("" if one_chunk else ", chunks"), dtype, backward,
                        {**shape, "KEYS": _backward_keys(one_chunk), "ONE_CHUNK": one_chunk}, warps,
                    )
                )  # fmt: skip
        summing = {"partials": "*fp32", "summed_row": "*i32", "summed_start": "*i32", "dk": rows, "dv": rows}
        summing |= {"n_partials": "i32", "width": "i32"} | dict.fromkeys(written[2:], "i32")
        constexprs = {"PARTIALS": SUM_PARTIALS, "COLUMNS": SUM_COLUMNS}
        found.append(Variant(_sum_partials_kernel, "", dtype, summing, constexprs, SUM_WARPS))
    return tuple(found)


VARIANTS = _variants()
