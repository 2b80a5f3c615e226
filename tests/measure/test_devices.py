"""The table of GPUs and the prediction from a data sheet."""

from __future__ import annotations

import pytest

from cocoop_fast.errors import UserError
from cocoop_fast.measure.cost import Product, RowKernel
from cocoop_fast.measure.devices import (
    BANDWIDTH_EFFICIENCY,
    EAGER_LAUNCH_SECONDS,
    GEMM_EFFICIENCY,
    GRAPH_LAUNCH_SECONDS,
    find_gpu,
    gpu_table,
)


@pytest.mark.parametrize("gpu", gpu_table(), ids=lambda gpu: gpu.name)
def test_a_record_is_complete_and_plausible(gpu):
    assert 8 <= gpu.memory_gb <= 300
    assert 200 <= gpu.bandwidth_gbs <= 10_000
    assert 20 <= gpu.units <= 400
    assert gpu.source and set(gpu.tflops) <= {"fp32", "fp16", "bf16"} and {"fp32", "fp16"} <= set(gpu.tflops)
    assert gpu.tflops["fp32"] < gpu.tflops["fp16"] <= 40 * gpu.tflops["fp32"]
    assert gpu.tflops.get("bf16", gpu.tflops["fp16"]) == gpu.tflops["fp16"]
    assert find_gpu(gpu.name) is gpu


def test_names_are_found_however_they_are_written():
    assert find_gpu("a100").name == "A100-80GB"
    assert find_gpu("NVIDIA A100-40gb").name == "A100-40GB"
    assert find_gpu("rtx 4090").name == find_gpu("4090").name == "RTX-4090"
    with pytest.raises(UserError, match="no device 'H1000' in the table; did you mean H100"):
        find_gpu("H1000")
    with pytest.raises(UserError, match="--list-devices"):
        find_gpu("abacus")


def test_names_are_unambiguous():
    names = [name for gpu in gpu_table() for name in (gpu.name, *gpu.aliases)]
    assert len(names) == len(set(names))


def test_a_precision_that_the_hardware_lacks_is_refused():
    with pytest.raises(UserError, match="T4 does not compute in bf16; choose --precision fp32 or fp16"):
        find_gpu("T4").at("bf16")


def test_large_products_are_bound_by_arithmetic_and_kernels_by_bandwidth():
    a100 = find_gpu("A100").at("fp16")
    product = Product(100_000, 512, 2048)
    expected = product.flops / (GEMM_EFFICIENCY * 312e12) + GRAPH_LAUNCH_SECONDS
    assert a100.seconds(product, 2) == pytest.approx(expected)
    kernel = RowKernel("layer_norm_fwd", 1e9)
    expected = 2e9 / (BANDWIDTH_EFFICIENCY * 2039e9)
    assert a100.seconds(kernel, 2) == pytest.approx(expected + GRAPH_LAUNCH_SECONDS)
    assert a100.seconds(kernel, 2, eager=True) == pytest.approx(expected + EAGER_LAUNCH_SECONDS)


def test_a_product_that_does_not_fill_the_device_is_slower_for_its_size():
    h100 = find_gpu("H100").at("fp16")
    small, large = Product(64, 2048, 512), Product(64 * 64, 2048, 512)
    seconds = [h100.seconds(product, 2) - GRAPH_LAUNCH_SECONDS for product in (small, large)]
    assert seconds[1] < 4 * seconds[0]
