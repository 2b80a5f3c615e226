"""A kernel whose compiler takes its process along, and one that compiles: for tools/compile_kernels.py."""

import os
from types import SimpleNamespace

import triton
import triton.language as tl

from cocoop_fast.kernels.variants import Variant


def _crashing_kernel():
    pass


def crash(**launch):
    os._exit(9)


@triton.jit
def _fine_kernel(x):
    tl.store(x, 1.0)


VARIANTS = (
    Variant(SimpleNamespace(fn=_crashing_kernel, arg_names=[], warmup=crash), "", "fp32", {}, {}, 1),
    Variant(_fine_kernel, "", "fp32", {"x": "*fp32"}, {}, 1),
)
