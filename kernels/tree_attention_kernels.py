"""Attention over the rows of a class tree: the kernels that tree_attention.py launches, and says more about."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Of bf16 the interpreter multiplies the bits as integers, and it cuts off instead of rounding: it gets wider operands.
_WIDEN_BF16 = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def operand(x, like):
    """x in the type of the other operand."""
    if _WIDEN_BF16 and like.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x.to(like.dtype)


@triton.jit
def _dot(a, b):
    """a b in fp32; fp32 operands are not rounded to TF32."""
    return tl.dot(operand(a, a), operand(b, b), input_precision="ieee")


@triton.jit
def _load_rows(row, n_ctx, ctx, stride_ctx, node, stride_node, columns, mask, ONE_LOAD: tl.constexpr):
    """(rows, columns) of rows that lie in two tensors, the first n_ctx in one, the others in another.

    With ONE_LOAD the pointers are chosen, and loaded from once. AMD's compiler cannot: of a tensor below 2 GB it keeps a base
    and an offset of 32 bits, and a choice between bases has none. There both are loaded from, each for its own rows.
    """
    row, columns = row[:, None], columns[None, :]
    in_ctx = ctx + row.to(tl.int64) * stride_ctx + columns
    in_node = node + (row - n_ctx).to(tl.int64) * stride_node + columns
    of_ctx = row < n_ctx
    if ONE_LOAD:
        # The columns are in before the choice: a choice of rows alone would hide that neighbours can be loaded at once.
        return tl.load(tl.where(of_ctx, in_ctx, in_node), mask=mask, other=0.0)
    from_ctx = tl.load(in_ctx, mask=mask & of_ctx, other=0.0)
    return tl.where(of_ctx, from_ctx, tl.load(in_node, mask=mask & (row >= n_ctx), other=0.0))


@triton.jit
def _load_slots(
    row, n_ctx, sos, ctx, stride_ctx, node, stride_node, columns, inside, ONE_LOAD: tl.constexpr
):  # fmt: skip
    """(KEYS, BLOCK_D) keys or values of the rows; of SOS for row -1. ONE_LOAD as in `_load_rows`."""
    of_sos = row[:, None] < 0
    in_sos = sos + tl.zeros_like(row)[:, None] + columns[None, :]
    if ONE_LOAD:
        in_ctx = ctx + row.to(tl.int64)[:, None] * stride_ctx + columns[None, :]
        in_node = node + (row - n_ctx).to(tl.int64)[:, None] * stride_node + columns[None, :]
        pointers = tl.where(of_sos, in_sos, tl.where(row[:, None] < n_ctx, in_ctx, in_node))
        return tl.load(pointers, mask=inside[None, :], other=0.0)
    of_rows = _load_rows(
        row, n_ctx, ctx, stride_ctx, node, stride_node, columns, inside[None, :] & (row[:, None] >= 0), ONE_LOAD
    )  # fmt: skip
    return tl.where(of_sos, tl.load(in_sos, mask=inside[None, :] & of_sos, other=0.0), of_rows)


@triton.jit
def _scores(
    q, k, visible, begin, scale, QUERIES: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """(QUERIES, KEYS) log2(e) q k / sqrt(D), and -inf for the keys that a query does not see."""
    words = tl.load(visible + begin // SLOTS * QUERIES + tl.arange(0, QUERIES))
    seen = (words[:, None] >> (begin % SLOTS + tl.arange(0, KEYS))[None, :]) & 1
    return tl.where(seen == 1, _dot(q, tl.trans(k)) * (scale * 1.4426950408889634), float("-inf"))


@triton.jit(do_not_specialize=["q_ctx_rows", "n_ctx", "heads"])
def tree_attention_fwd_kernel(
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
    ONE_LOAD: tl.constexpr,
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
    q = _load_rows(
        query, q_ctx_rows,
        q_ctx + image * stride_q_ctx_b, stride_q_ctx_r, q_node + image * stride_q_node_b, stride_q_node_r,
        columns, asks, ONE_LOAD,
    )  # fmt: skip

    # Softmax some keys at a time. The first are with SOS, which every query sees: from there on `highest` is finite.
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for begin in range(tl.load(tile_chunk + tile) * SLOTS, tl.load(tile_chunk + tile + 1) * SLOTS, KEYS):
        slot = begin + tl.arange(0, KEYS)
        row = tl.load(slot_row + slot)
        k = _load_slots(
            row, n_ctx, sos_k, k_ctx, stride_k_ctx_r, k_node, stride_k_node_r, columns, inside, ONE_LOAD
        )
        v = _load_slots(
            row, n_ctx, sos_v, v_ctx, stride_v_ctx_r, v_node, stride_v_node_r, columns, inside, ONE_LOAD
        )
        scores = _scores(q, k, visible, begin, scale, QUERIES, SLOTS, KEYS)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, axis=1)
        result = result * fade[:, None] + _dot(operand(weights, v), v)
        highest = higher

    o_pointers = o + image * stride_ob + query.to(tl.int64) * stride_or
    tl.store(o_pointers[:, None] + columns[None, :], result / total[:, None], mask=asks)


@triton.jit
def _slot_gradients(
    weights, d_scores, q, d_o, k, row, slot, image, rows_written, n_partials, width,
    slot_partial, partials, dk, dv, stride_dkr, stride_dvr, columns, inside,
):  # fmt: skip
    """Stores dk = d_scores^T q and dv = weights^T d_o of these slots; returns dq = d_scores k."""
    d_scores = operand(d_scores, q)
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
    slot_dv = _dot(tl.trans(operand(weights, d_o)), d_o)
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
def tree_attention_bwd_kernel(
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
    ONE_LOAD: tl.constexpr,
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
    q = _load_rows(
        query, q_ctx_rows,
        q_ctx + image * stride_q_ctx_b, stride_q_ctx_r, q_node + image * stride_q_node_b, stride_q_node_r,
        columns, asks, ONE_LOAD,
    )  # fmt: skip
    d_o_pointers = d_o + image * stride_dob + query.to(tl.int64) * stride_dor
    d_o_rows = tl.load(d_o_pointers[:, None] + columns[None, :], mask=asks, other=0.0)

    # weights = softmax(scores), d_weights = d_o v^T, delta = sum_s weights d_weights,
    # d_scores = weights (d_weights - delta)
    first, end = tl.load(tile_chunk + tile) * SLOTS, tl.load(tile_chunk + tile + 1) * SLOTS
    if ONE_CHUNK:
        slot = first + tl.arange(0, KEYS)
        row = tl.load(slot_row + slot)
        k = _load_slots(
            row, n_ctx, sos_k, k_ctx, stride_k_ctx_r, k_node, stride_k_node_r, columns, inside, ONE_LOAD
        )
        v = _load_slots(
            row, n_ctx, sos_v, v_ctx, stride_v_ctx_r, v_node, stride_v_node_r, columns, inside, ONE_LOAD
        )
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
                row, n_ctx, sos_k, k_ctx, stride_k_ctx_r, k_node, stride_k_node_r, columns, inside, ONE_LOAD
            )
            v = _load_slots(
                row, n_ctx, sos_v, v_ctx, stride_v_ctx_r, v_node, stride_v_node_r, columns, inside, ONE_LOAD
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
                row, n_ctx, sos_k, k_ctx, stride_k_ctx_r, k_node, stride_k_node_r, columns, inside, ONE_LOAD
            )
            v = _load_slots(
                row, n_ctx, sos_v, v_ctx, stride_v_ctx_r, v_node, stride_v_node_r, columns, inside, ONE_LOAD
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
def sum_partials_kernel(
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
