"""Attention over the rows of a class tree, forward and backward.

One program owns a (tile, head, image): at most 16 query rows, and the keys that they see, 32 at a time; see
tree_attention_plan.py. Query, key and value are read where the GEMM wrote them, a key by its row number.

Memory traffic a row of d numbers of s bytes: forward 4 d s (q, k, v in, o out) and what neighbouring tiles share: the
1 + M rows of SOS and context and the open ancestors, read by each tile, mostly out of the L2 cache. Backward 7 d s (q,
k, v, grad o in; dq, dk, dv out), and for the context and open ancestors of each tile a partial of 8 d bytes, written and
read once. Predicted: below a thousand rows the time of a launch; above, bound by the latency of one gather, two
products and a softmax in a row, of which 16 to 32 run on a multiprocessor at a time: half of the bandwidth. Measured on an
H200 in fp16, docs/performance.md: 446 rows 3.4 and 7.5 us, forward and backward; 32,056 rows 0.58 and 0.28 of a copy's rate.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .rows import STORAGE_TYPES, arguments_are_known, check_array, check_rows
from .tree_attention_kernels import sum_partials_kernel, tree_attention_bwd_kernel, tree_attention_fwd_kernel
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

# Whether rows that lie in two tensors come by one load; not on AMD's GPUs, see tree_attention_kernels.py.
ONE_LOAD = torch.version.hip is None


class TreeAttention:
    """The attention of a class tree: which keys each row reads, planned once.

    Args:
        tree: the class tree.
        queries: the query rows, strictly ascending nodes, (Q,); None if all R rows are.
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
        q, k, v, sos_k, sos_v, heads = inputs
        head_size, block = _head_block(o.shape[2], heads)
        pointers, strides = self._inputs(q, k, v, sos_k, sos_v, o)
        if not batch:
            return
        plan = self.plan
        with torch.cuda.device_of(o):
            tree_attention_fwd_kernel[(plan.tiles * heads, batch)](
                *pointers, o, plan.tile_query, plan.tile_chunk, plan.slot_row, plan.visible,
                plan.n_ctx if self.all_rows else 0, plan.n_ctx, heads, head_size**-0.5,
                *strides, o.stride(0), o.stride(1),
                HEAD_SIZE=head_size, BLOCK_D=block, QUERIES=QUERIES, SLOTS=SLOTS, KEYS=SLOTS, ONE_LOAD=ONE_LOAD,
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
        q, k, v, sos_k, sos_v, heads = inputs
        head_size, block = _head_block(width, heads)
        pointers, strides = self._inputs(q, k, v, sos_k, sos_v, grad_o)
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
            tree_attention_bwd_kernel[(plan.tiles * heads, batch)](
                grad_o, *pointers, dq, dk, dv, workspace,
                plan.tile_query, plan.tile_chunk, plan.slot_row, plan.slot_partial, plan.visible,
                plan.n_ctx if self.all_rows else 0, plan.n_ctx, heads, head_size**-0.5,
                queries, rows, plan.partials, width,
                grad_o.stride(0), grad_o.stride(1), *strides, dq.stride(0), dq.stride(1), *dkv_strides,
                HEAD_SIZE=head_size, BLOCK_D=block, QUERIES=QUERIES, SLOTS=SLOTS,
                KEYS=_backward_keys(plan.one_chunk), ONE_CHUNK=plan.one_chunk, ONE_LOAD=ONE_LOAD,
                num_warps=_warps(grad_o.dtype, block)[1 if plan.one_chunk else 2], num_stages=1,
            )  # fmt: skip
            summed = plan.summed_context if context_only else len(plan.summed_row)
            if summed:
                sum_partials_kernel[(summed * triton.cdiv(2 * width, SUM_COLUMNS), batch)](
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
    if arguments_are_known():
        return
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
                "ONE_LOAD": True,
            }
            on_amd = {"ONE_LOAD": False}
            name = f"D={head_size}"
            forward_warps, *backward_warps = _warps(storage, block)
            found.append(
                Variant(tree_attention_fwd_kernel, name, dtype, forward, shape, forward_warps, 1, on_amd)
            )
            for one_chunk, warps in zip((True, False), backward_warps, strict=True):
                found.append(
                    Variant(
                        tree_attention_bwd_kernel, name + ("" if one_chunk else ", chunks"), dtype, backward,
                        {**shape, "KEYS": _backward_keys(one_chunk), "ONE_CHUNK": one_chunk}, warps, 1, on_amd,
                    )
                )  # fmt: skip
        summing = {"partials": "*fp32", "summed_row": "*i32", "summed_start": "*i32", "dk": rows, "dv": rows}
        summing |= {"n_partials": "i32", "width": "i32"} | dict.fromkeys(written[2:], "i32")
        constexprs = {"PARTIALS": SUM_PARTIALS, "COLUMNS": SUM_COLUMNS}
        found.append(Variant(sum_partials_kernel, "", dtype, summing, constexprs, SUM_WARPS))
    return tuple(found)


VARIANTS = _variants()
