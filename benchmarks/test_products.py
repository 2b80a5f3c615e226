"""The products of a layer, each alone, as a share of what the processor multiplies and adds in registers.

    pytest benchmarks/test_products.py --benchmark-only -s      # a line for each

Weights, rows and results are used again in each round, so what is seen is the kernel and not what lies around it in a step.
The multiply-adds in registers are timed before each round, and their best counts. They need little of what another program on
the same core would take, and where it takes the rest a product's share falls: so shares come as the best and as the median.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine, TransformerBlock
from cocoop_fast.measure.timing import seconds_of
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP

pytestmark = pytest.mark.skipif(
    CPP.why_unavailable() is not None or not cpu.multiplies_itself(),
    reason="the products here are not the extension's own",
)

ROUNDS = 100
MULTIPLY_ADDS = 100_000  # in a thread, of each of its registers: half a millisecond
FLOPS_A_ROUND = 1e9  # about: a single small product would be the beginning of threads
LAYERS: dict[str, Callable[[TransformerBlock], Affine]] = {
    "qkv": lambda block: block.in_proj,
    "out": lambda block: block.out_proj,
    "fc": lambda block: block.fc,
    "proj": lambda block: block.proj,
}


def rows_of(n: int, width: int) -> Tensor:
    """As the engine lays them out."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(n, width + cpu.ROW_PADDING, generator=generator)[:, :width]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("n", [79, 446, 512])
def test_products(benchmark: Any, problem_of: Any, n: int, layer: str, direction: str) -> None:
    affine = LAYERS[layer](problem_of(20, 1).weights.blocks[0])
    width, inner = affine.weight.shape
    linear = cpu.frozen_linear(affine, packed=True)
    x, y = rows_of(n, inner), rows_of(n, width)
    flops = 2.0 * n * width * inner
    calls = max(1, round(FLOPS_A_ROUND / flops))
    peak, rates = list[float](), list[float]()

    def time_registers() -> None:
        done: list[float] = []
        seconds = seconds_of(lambda: done.append(cpu.multiply_add_loop(MULTIPLY_ADDS)))
        peak.append(done[0] / seconds)

    def product() -> None:
        for _ in range(calls):
            linear.forward(x, y) if direction == "forward" else linear.backward(y, x)

    benchmark.group = f"products of {n} rows"
    benchmark.pedantic(
        lambda: rates.append(calls * flops / seconds_of(product)),
        setup=time_registers,
        rounds=ROUNDS,
    )
    best, usual = max(rates) / max(peak), median(rates) / max(peak)
    benchmark.extra_info |= {"rows": n, "inner": inner, "columns": width, "direction": direction}
    benchmark.extra_info |= {"of_peak_best": best, "of_peak_median": usual}
    print(
        f"\n{direction}, {n} x {inner} x {width}, {torch.get_num_threads()} threads: "
        f"{best:.0%} of {max(peak) / 1e9:.0f} GFLOP/s, median {usual:.0%}"
    )
