"""How fast this machine is: the engine's operations on its CPU, as steps run them; the data sheet of its GPU."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, log
from time import perf_counter

import numpy as np
import torch

from cocoop_fast.clip.frozen import TextWeights
from cocoop_fast.engine.memory import free_memory
from cocoop_fast.errors import UserError
from cocoop_fast.measure.cost import Operation, Product, TreeCost
from cocoop_fast.measure.devices import BANDWIDTH_EFFICIENCY, DTYPES, GEMM_EFFICIENCY, DataSheet, Gpu
from cocoop_fast.measure.machine import describe_machine
from cocoop_fast.measure.peak import Peak, PeakLoops
from cocoop_fast.measure.peak_memory import peak_memory
from cocoop_fast.measure.problem import ProblemSpec, build_problem
from cocoop_fast.measure.timed_step import Shape, ShortTower, shape_of
from cocoop_fast.measure.timing import interleave
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.prompts.tree import ClassTree

COPY_BYTES = 64e6
MOST_ROWS = 2048  # of a measured pass
FULL_PANEL = cpu.PANEL_ROWS or MOST_ROWS
GPU_SIDE, GPU_COPY_ELEMENTS = 4096, 1 << 28  # of the square product, of the copy


@dataclass(frozen=True)
class Machine:
    """This machine, as measured."""

    name: str
    threads: int
    memory_bytes: int | None  # available when it was measured
    products: dict[Shape, tuple[tuple[int, float], ...]]  # FLOP/s at row counts, ascending
    kernels: dict[str, float]  # elements a second, by kind
    copy_bandwidth: float  # bytes read and written a second, into memory that is there
    fresh_bandwidth: float  # the same into memory that is allocated for it
    peak: Peak | None = None  # of the processor

    def rates(self) -> dict[str, str]:
        """For people."""
        rates = [rate for measured in self.products.values() for _, rate in measured]
        return {
            "measured products": f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s",
            **(
                {}
                if self.peak is None
                else {
                    "multiply-adds at most": f"{self.peak.flops / 1e9:.0f} GFLOP/s "
                    f"(the fastest product: {self.best_rate / self.peak.flops:.0%} of it)",
                    "reading": f"{self.peak.read_bandwidth / 1e9:.1f} GB/s",
                }
            ),
            "copy": f"{self.copy_bandwidth / 1e9:.1f} GB/s",
            "copy into new memory": f"{self.fresh_bandwidth / 1e9:.1f} GB/s",
            "threads": str(self.threads),
        }

    def seconds(self, operation: Operation, itemsize: int, *, eager: bool = False) -> float:
        if isinstance(operation, Product):
            return operation.flops / self.gemm_rate(operation)
        if operation.kind in self.kernels:
            return operation.elements / self.kernels[operation.kind]
        bandwidth = self.fresh_bandwidth if eager else self.copy_bandwidth
        return itemsize * operation.elements / bandwidth + operation.flops / self.best_rate

    def gemm_rate(self, product: Product) -> float:
        """FLOP/s, interpolated between the row counts that were measured."""
        measured = self.products.get(shape_of(product))
        if measured is None:
            return self.best_rate
        rows, rates = zip(*measured, strict=True)
        return float(np.interp(log(product.rows), np.log(rows), rates))

    @property
    def best_rate(self) -> float:
        """FLOP/s of the fastest product."""
        return max(rate for rates in self.products.values() for _, rate in rates)


def measure_cpu(
    weights: TextWeights,
    tree: ClassTree,
    batch: int,
    *,
    rounds: int = 3,
    max_seconds: float = 6.0,
    clock: Callable[[], float] = perf_counter,
) -> Machine:
    """Measure what a step over `batch` images of this tree asks of the processor, in float32.

    Args:
        weights: of the text tower; their shapes alone count.
        tree: the class tree.
        batch: B.
        rounds: how often a step, a forward pass and the copies are measured, after one run that warms up.
        max_seconds: for each of them; each is measured once at least.
        clock: what tells the seconds.

    Raises:
        UserError: the engine is not there to be measured.
    """
    if CPP.why_unavailable():
        raise UserError(
            "This machine cannot be measured without the C++ extension; build it, or name a --device of the table.",
            exit_status=1,
        )
    if tree.rows > MOST_ROWS:  # some of the classes will do
        tree = tree.subtree(tree.ancestors(tree.leaves[tree.leaves < MOST_ROWS]))
    images = min(batch, max(1, MOST_ROWS // tree.rows))
    tower = ShortTower(weights, tree, clock)
    source = torch.zeros(int(COPY_BYTES / 4))
    target = torch.empty_like(source).copy_(source)
    actions: dict[str, Callable[[], object]] = {
        "step": lambda: tower.run(images, backward=True),
        # Without gradients images go through in groups, whose panels are full.
        "forward": lambda: tower.run(max(images, ceil(FULL_PANEL / tree.rows)), backward=False),
        "copy": lambda: target.copy_(source),
        "fresh copy": source.clone,
    }
    loops = PeakLoops()
    actions |= loops.actions
    for action in actions.values():
        action()
    timings = interleave(actions, rounds=rounds, max_seconds=max_seconds, clock=clock)
    products: dict[Shape, list[tuple[int, float]]] = defaultdict(list)
    kernels: dict[str, float] = {}
    for key, rate in tower.rates().items():
        if isinstance(key, str):
            kernels[key] = rate
        else:
            products[key[0]].append((key[1], rate))
    return Machine(
        name=str(describe_machine()["processor"]),
        threads=torch.get_num_threads(),
        memory_bytes=free_memory(torch.device("cpu")),
        products={shape: tuple(sorted(rates)) for shape, rates in products.items()},
        kernels=kernels,
        copy_bandwidth=2 * COPY_BYTES / timings["copy"].best,
        fresh_bandwidth=2 * COPY_BYTES / timings["fresh copy"].best,
        peak=loops.peak(timings),
    )


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Let torch and the engine use so many threads for a while; None changes nothing."""
    previous = torch.get_num_threads()
    torch.set_num_threads(previous if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def measure_process_bytes() -> int:
    """What any first step takes besides its buffers: pages of the libraries, the vendor's own workspace.

    Measured by a small step in a process of its own.
    """
    spec = ProblemSpec(("cat", "dog"), model="demo")
    problem = build_problem(spec)
    cost = TreeCost(problem.weights, problem.tree, cpu)
    counted = cost.activation_bytes(spec.batch, keeps=True) + cost.class_list_bytes
    return max(0, peak_memory(spec, "engine") - counted)


def measure_gpu(precision: str) -> DataSheet:
    """The current CUDA or ROCm device, by a large product and a large copy in `precision`.

    Raises:
        UserError: it does not compute in this precision.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise UserError(f"The {properties.name} does not compute in bf16; choose --precision fp16 or fp32.")
    flops, bandwidth = measure_rates(device, DTYPES[precision], GPU_SIDE, GPU_COPY_ELEMENTS)
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

    def until_done(action: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    actions = {
        "product": until_done(lambda: torch.mm(x, x, out=out)),
        "copy": until_done(lambda: target.copy_(source)),
    }
    for action in actions.values():
        action()
    timings = interleave(actions, rounds=5, max_seconds=60)
    return 2.0 * side**3 / timings["product"].best, 2.0 * source.nbytes / timings["copy"].best
