"""Triton's launches without a GPU: everything up to the machine code happens as it does in front of one.

What a launch compiles depends on more than the kernel and its types: the just-in-time compiler marks pointers and sizes by
what it sees in the arguments, each vendor's its own way. So nothing of that is written down here: the kernel's own binder
is asked, for a driver that names the target and has no device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cocoop_fast.kernels.variants import Variant

POINTEES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "i32": torch.int32,
    "i64": torch.int64,
}


# The just-in-time compiler keeps what it made by the device's number, so each target has its own.
_numbers: dict[str, int] = {}


class _Driver:
    """Of a target that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.number = _numbers.setdefault(str(target), len(_numbers))

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target_of_launches(target: GPUTarget) -> Iterator[None]:
    """Launches are for this target. They may be compiled (`warmup`), not done."""
    name = "_active" if hasattr(driver, "_active") else "active"  # until Triton 3.3
    before = getattr(driver, name)
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        setattr(driver, name, before)


class Memory:
    """A tensor as a launch sees it: aligned, as torch's allocator has them, with so many bytes from its start on."""

    def __init__(self, dtype: torch.dtype, nbytes: int) -> None:
        self.dtype, self._nbytes = dtype, nbytes

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return self._nbytes


def arguments(variant: Variant, nbytes: int) -> dict[str, Any]:
    """What a launch of this variant is given, by name; the memory of rows with so many bytes.

    Sizes that a launch with CLIP's widths has as multiples of 16 are such.
    """
    made: dict[str, Any] = {}
    for name, kind in variant.signature.items():
        if kind.startswith("*"):
            made[name] = Memory(POINTEES[kind[1:]], nbytes)
        elif kind == "fp32":
            made[name] = 0.5
        else:
            made[name] = 512 if name in ("width", "inner") or name.startswith("stride_") else 7
    return made


def compile_launch(variant: Variant, target: GPUTarget, *, nbytes: int = 2**20) -> Any:
    """Triton's CompiledKernel of what a launch of a variant compiles on this target.

    Args:
        variant: of a kernel.
        target: the GPU.
        nbytes: of each tensor; AMD's compiler takes other instructions for those of 2 GB and more.
    """
    with target_of_launches(target):
        return variant.kernel.warmup(
            **arguments(variant, nbytes),
            **variant.constexprs_for(target.backend),
            grid=(1,),
            num_warps=variant.num_warps,
            num_stages=variant.num_stages,
        )


@triton.jit
def _increment_kernel(x):
    tl.store(x, tl.load(x) + 1)


def serves(target: GPUTarget) -> bool:
    """Whether this Triton compiles for a target at all. Where it does not, it may end the process, so one is spent."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            compile_launch(Variant(_increment_kernel, "", "fp32", {"x": "*fp32"}, {}, 1), target)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
