"""A GPU that is in this machine, measured: the rates that its data sheet would give."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cocoop_fast.errors import UserError
from cocoop_fast.measure.devices import BANDWIDTH_EFFICIENCY, DTYPES, GEMM_EFFICIENCY, DataSheet, Gpu

SIDE = 4096  # of the square product
COPY_ELEMENTS = 1 << 28
ROUNDS = 5


def measure_gpu(precision: str) -> DataSheet:
    """The current CUDA or ROCm device, by a large product and a large copy in `precision`.

    Raises:
        UserError: it does not compute in this precision.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise UserError(f"The {properties.name} does not compute in bf16; choose --precision fp16 or fp32.")
    flops, bandwidth = measure_rates(device, DTYPES[precision], SIDE, COPY_ELEMENTS)
    free, _ = torch.cuda.mem_get_info(device)
    gpu = Gpu(
        name=properties.name,
        memory_gb=free / 1e9,
        bandwidth_gbs=bandwidth / BANDWIDTH_EFFICIENCY / 1e9,
        units=properties.multi_processor_count,
        tflops={precision: flops / GEMM_EFFICIENCY / 1e12},
        source="measured on this machine",
    )
    return gpu.at(precision)


def measure_rates(
    device: torch.device, dtype: torch.dtype, side: int, copy_elements: int
) -> tuple[float, float]:
    """FLOP/s of a (side, side) product, and bytes a second read and written by a copy; the best of a few."""
    x, out = torch.ones(2, side, side, device=device, dtype=dtype)
    source, target = torch.zeros(2, copy_elements, device=device, dtype=dtype)
    product = _best(device, lambda: torch.mm(x, x, out=out))
    copy = _best(device, lambda: target.copy_(source))
    return 2.0 * side**3 / product, 2.0 * source.numel() * source.element_size() / copy


def _best(device: torch.device, action: Callable[[], object]) -> float:
    """Seconds, until the device is done."""
    seconds = []
    for _ in range(1 + ROUNDS):  # the first warms up
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
