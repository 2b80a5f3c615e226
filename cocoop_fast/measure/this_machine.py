"""How fast this machine is: its products at the tree's row counts, the engine's kernels, copies.

Weights are as many as do not fit into a cache, so that each product finds its own in memory, as in a step. All is
measured in interleaved rounds, and the best round counts.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil, log
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine, TextWeights
from cocoop_fast.engine.memory import free_memory
from cocoop_fast.errors import UserError
from cocoop_fast.measure.cost import (
    Operation,
    PassCost,
    Product,
    RowKernel,
    TreeCost,
    attention_kernel,
    gradient_of,
    head_kernel,
    learner_kernel,
)
from cocoop_fast.measure.machine import describe_machine
from cocoop_fast.measure.peak_memory import peak_memory
from cocoop_fast.measure.problem import ProblemSpec, build_problem
from cocoop_fast.measure.sizes import RowCounts, TowerSizes
from cocoop_fast.measure.timing import interleave
from cocoop_fast.methods.cocoop import MetaNet
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.head import cosine_cross_entropy
from cocoop_fast.ops.linear import FrozenLinear
from cocoop_fast.prompts.tree import ClassTree

CACHE_BYTES = 64e6  # weights beyond this are read from memory
COPY_BYTES = 64e6
PANEL_ROWS = cpu.PANEL_ROWS or 512
MOST_ROWS = 8192  # that attention and the row kernels are measured on

Shape: TypeAlias = tuple[int, int, bool]  # inner, columns, backward


def shape_of(product: Product) -> Shape:
    """What decides a product's rate besides its rows."""
    return product.inner, product.columns, product.backward


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

    def rates(self) -> dict[str, str]:
        """For people."""
        rates = [rate for measured in self.products.values() for _, rate in measured]
        return {
            "measured products": f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s",
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
    max_seconds: float = 2.0,
    clock: Callable[[], float] = perf_counter,
) -> Machine:
    """Measure what a step over `batch` images of this tree asks of the processor, in float32.

    Args:
        weights: of the text tower; their shapes alone count.
        tree: the class tree.
        batch: B.
        rounds: how often each thing is measured.
        max_seconds: for each thing; each is measured once at least.
        clock: what tells the seconds.

    Raises:
        UserError: the engine is not there to be measured.
    """
    if CPP.why_unavailable():
        raise UserError(
            "This machine cannot be measured without the C++ extension; build it, or name a --device of the table.",
            exit_status=1,
        )
    sizes, counts = TowerSizes.of(weights), RowCounts.of(tree)
    step = TreeCost(weights.to(torch.device("meta"), torch.float32), tree, cpu).step(batch)
    generator = torch.Generator().manual_seed(0)
    work = {
        **_products(sizes, step, generator),
        **_kernels(sizes, tree, min(batch, max(1, MOST_ROWS // counts.rows)), generator),
        **_copies(),
    }
    for item in work.values():
        item.run()
    gc.freeze()  # what is alive stays alive: to go through it before each of many short runs would take seconds
    try:
        timings = interleave(
            {name: item.run for name, item in work.items()},
            rounds=rounds,
            max_seconds=max_seconds,
            clock=clock,
        )
    finally:
        gc.unfreeze()
    rates = {name: item.amount / timings[name].best for name, item in work.items()}
    products: dict[Shape, list[tuple[int, float]]] = {}
    for name, item in work.items():
        if item.product is not None:
            products.setdefault(shape_of(item.product), []).append((item.product.rows, rates[name]))
    return Machine(
        name=str(describe_machine()["processor"]),
        threads=torch.get_num_threads(),
        memory_bytes=free_memory(torch.device("cpu")),
        products={shape: tuple(sorted(rows)) for shape, rows in products.items()},
        kernels={name: rates[name] for name, item in work.items() if item.is_kernel},
        copy_bandwidth=rates["copy"],
        fresh_bandwidth=rates["fresh copy"],
    )


@dataclass(frozen=True)
class _Work:
    """Something to time. `amount` over its seconds is the rate that is wanted."""

    run: Callable[[], object]
    amount: float  # FLOPs of products, elements of kernels, bytes of copies
    product: Product | None = None
    is_kernel: bool = False


def _products(sizes: TowerSizes, step: PassCost, generator: torch.Generator) -> dict[str, _Work]:
    """Every product of the step, of panels about as large once; for larger batches at whole panels, if those are none."""
    cases: dict[tuple[Shape, bool, int], Product] = {}
    for op in step.operations:
        if isinstance(op, Product):  # panels differ by a row; the context rows and the EOT rows are fewer
            key = shape_of(op), op.fused, round(4 * log(op.rows))
            cases[key] = max(op, cases.get(key, op), key=lambda op: op.rows)
    products = set(cases.values())
    if 2 * max(op.rows for op in products) < PANEL_ROWS:
        products |= {replace(op, rows=PANEL_ROWS) for op in products}
    layer_bytes = 4 * (4 * sizes.width + 2 * sizes.mlp_width) * sizes.width
    copies = max(2, min(sizes.layers, ceil(CACHE_BYTES / layer_bytes)))
    most = max(op.rows for op in products)
    matrices = {
        width: torch.randn(most, width + cpu.ROW_PADDING, generator=generator)[:, :width]
        for op in products
        for width in (op.inner, op.columns)
    }
    linears: dict[tuple[int, int], list[FrozenLinear]] = {}
    found: dict[str, _Work] = {}
    for op in sorted(products, key=lambda op: (op.rows, op.inner, op.columns, op.backward)):
        stored = (op.inner, op.columns) if op.backward else (op.columns, op.inner)  # of a weight: (out, in)
        if stored not in linears:
            linears[stored] = [_linear(*stored, generator) for _ in range(copies)]
        out = torch.empty(op.rows, op.columns)
        run = _multiply(op, matrices[op.inner][: op.rows], linears[stored], out)
        name = f"{'backward' if op.backward else 'forward'} {op.rows}x{op.inner}x{op.columns}"
        found[name] = _Work(run, copies * op.flops, product=op)
    return found


def _linear(columns: int, inner: int, generator: torch.Generator) -> FrozenLinear:
    weight = torch.randn(columns, inner, generator=generator)
    return cpu.frozen_linear(Affine(weight, torch.zeros(columns)), packed=True)


def _multiply(op: Product, x: Tensor, linears: list[FrozenLinear], out: Tensor) -> Callable[[], None]:
    """The product by each of the weights in turn, with its activation."""
    u = torch.zeros_like(out)

    def run() -> None:
        for linear in linears:
            if op.backward:
                linear.backward_activation(x, u, "quick_gelu", out) if op.fused else linear.backward(x, out)
            elif op.fused:
                linear.forward_activation(x, "quick_gelu", u, out)
            else:
                linear.forward(x, out)

    return run


def _kernels(sizes: TowerSizes, tree: ClassTree, batch: int, generator: torch.Generator) -> dict[str, _Work]:
    """The engine's other kernels over the tree's rows, panel by panel where the engine does so."""
    counts, d = RowCounts.of(tree), sizes.width
    rows = batch * counts.rows
    x, y = torch.randn(2, rows, d, generator=generator)
    ones, zeros = torch.ones(d), torch.zeros(d)
    mean, rstd = torch.zeros(rows), torch.ones(rows)
    panels = [slice(start, start + PANEL_ROWS) for start in range(0, rows, PANEL_ROWS)]

    def layer_norm_fwd() -> None:
        for p in panels:
            cpu.layer_norm_fwd(x[p], None, None, ones, zeros, 1e-5, y[p], mean[p], rstd[p])

    def layer_norm_bwd() -> None:
        for p in panels:
            cpu.layer_norm_bwd(x[p], x[p], ones, mean[p], rstd[p], y[p], accumulate=True)

    norm = RowKernel("layer_norm_fwd", 3.0 * rows * d)
    timed: list[tuple[Operation, Callable[[], object]]] = [
        (norm, layer_norm_fwd),
        (gradient_of(norm), layer_norm_bwd),
        *_attention(sizes, tree, batch, generator),
        *_learner_and_head(sizes, counts, batch, generator),
    ]
    return {
        op.kind: _Work(run, op.elements, is_kernel=True) for op, run in timed if isinstance(op, RowKernel)
    }


def _attention(
    sizes: TowerSizes, tree: ClassTree, batch: int, generator: torch.Generator
) -> list[tuple[Operation, Callable[[], object]]]:
    counts, d, heads = RowCounts.of(tree), sizes.width, sizes.heads
    qkv = torch.randn(batch, counts.rows, 3 * d, generator=generator)
    q, k, v = qkv.split(d, dim=-1)
    grad_q, grad_k, grad_v = torch.empty_like(qkv).split(d, dim=-1)
    sos_k, sos_v = torch.randn(2, heads, d // heads, generator=generator)
    timed: list[tuple[Operation, Callable[[], object]]] = []
    for leaves_alone in (False, True):
        plan = cpu.TreeAttention(tree, tree.leaves if leaves_alone else None)
        asking = counts.leaves if leaves_alone else counts.rows
        o = torch.randn(batch, asking, d, generator=generator)
        workspace = torch.empty(plan.workspace_floats(batch, heads, d // heads))
        inputs = (q[:, :asking], k, v, sos_k, sos_v, heads)
        kernel = attention_kernel(counts, batch, d, leaves_alone=leaves_alone)
        timed.append((kernel, lambda a=plan, i=inputs, o=o: a.forward(i, o)))  # type: ignore[misc]
        timed.append(
            (
                gradient_of(kernel),
                lambda a=plan, i=inputs, o=o, s=workspace: a.backward(  # type: ignore[misc]
                    o, i, grad_q[:, : o.shape[1]], grad_k, grad_v, s
                ),
            )
        )
    return timed


def _learner_and_head(
    sizes: TowerSizes, counts: RowCounts, batch: int, generator: torch.Generator
) -> list[tuple[Operation, Callable[[], object]]]:
    """The Meta-Net and the loss as autograd runs them. A kernel's backward is timed with its forward, and forward
    alone, so backward's rate is that of both together."""
    image = torch.nn.functional.normalize(torch.randn(batch, sizes.embed_dim, generator=generator))
    meta_net = MetaNet(sizes.embed_dim, sizes.width)
    ctx = torch.zeros(counts.context, sizes.width, requires_grad=True)
    grad_contexts = torch.randn(batch, counts.context, sizes.width, generator=generator)
    features = torch.randn(batch, counts.leaves, sizes.embed_dim, generator=generator, requires_grad=True)
    leaf_of_class = torch.arange(counts.classes) % counts.leaves
    label, scale = torch.zeros(batch, dtype=torch.int64), torch.tensor(4.6)

    def contexts() -> Tensor:
        return ctx + meta_net(image)[:, None]

    def loss() -> Tensor:
        return cosine_cross_entropy(image, features[:, leaf_of_class], scale, label)[0]

    learner, head = learner_kernel(sizes, batch), head_kernel(sizes, counts, batch)
    return [
        (learner, torch.no_grad()(contexts)),
        (gradient_of(learner), lambda: contexts().backward(grad_contexts)),
        (head, torch.no_grad()(loss)),
        (gradient_of(head), lambda: loss().backward()),
    ]


def _copies() -> dict[str, _Work]:
    source = torch.zeros(int(COPY_BYTES / 4))
    target = torch.empty_like(source).copy_(source)
    amount = 2 * COPY_BYTES
    return {"copy": _Work(lambda: target.copy_(source), amount), "fresh copy": _Work(source.clone, amount)}


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
