"""Kernels that must not pass tools/compile_kernels.py: one spills, one takes too much shared memory, one is wrong."""

import triton
import triton.language as tl

from cocoop_fast.kernels.variants import Variant


@triton.jit
def _spilling_kernel(x, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + columns)
    tl.debug_barrier()  # all of them are held here
    tl.store(x + columns + tl.sum(values).to(tl.int32), values)


@triton.jit
def _greedy_kernel(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    values = tl.load(x + rows * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(x + rows * ROWS + tl.arange(0, ROWS)[None, :], tl.dot(values, tl.trans(values)).to(tl.float16))


@triton.jit
def _wrong_kernel(x):
    tl.store(x, undefined_name)  # noqa: F821


VARIANTS = (
    Variant(_spilling_kernel, "", "fp32", {"x": "*fp32"}, {"BLOCK": 32768}, 1),
    Variant(_greedy_kernel, "", "fp16", {"x": "*fp16"}, {"ROWS": 64, "COLUMNS": 2048}, 16),
    Variant(_wrong_kernel, "", "fp32", {"x": "*fp32"}, {}, 1),
)
