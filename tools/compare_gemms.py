"""How the text tower's matrix multiplications are best done on this CPU.

    python tools/compare_gemms.py --out gemms.json

Three questions, at the row counts of several class lists (ViT-B/16's tower, d = 512, float32):

1. One product at a time: torch.mm(x, W.T) and, for input gradients, torch.mm(y, W), against a contiguous transposed
   copy of W, oneDNN's prepacked linear, MKL's prepacked linear and the engine's own kernel.
2. All layers: whole-layer products with the library's threads, against panels of rows that each thread takes through
   all layers alone.
3. The best of everything, as a share of what the plain products take.

Variants are interleaved and the best of several rounds counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.cli.output import print_table
from cocoop_fast.measure.machine import describe_machine, one_line
from cocoop_fast.measure.timing import interleave
from cocoop_fast.ops import cpu as cpu_kernels
from cocoop_fast.ops.cpu import ROW_PADDING
from cocoop_fast.ops.extensions import CPP

D, LAYERS = 512, 12
SHAPES = {"qkv": (3 * D, D), "out": (D, D), "fc": (4 * D, D), "proj": (D, 4 * D)}  # weights, (out, in)
ROWS = (79, 446, 1323, 4007)  # 20, 100, 300 and 1000 ImageNet names, with their 4 context rows
PANEL_ROWS = 128

Variants = dict[str, Callable[[], object]]


def product_variants(x: Tensor, weight: Tensor) -> Variants:
    """Ways to compute x W^T (rows, out), W (out, in). An input gradient is the same with W^T for W."""
    out = torch.empty(len(x), len(weight))
    transposed = weight.T.contiguous()
    variants: Variants = {
        "mm": lambda: torch.mm(x, weight.T, out=out),
        "transposed copy": lambda: torch.mm(x, transposed, out=out),
    }
    packed = _onednn_packed(weight.contiguous(), len(x))
    if packed is not None:
        linear = torch.ops.mkldnn._linear_pointwise
        variants["oneDNN packed"] = functools.partial(linear, x, packed, None, "none", [], "")
    mkl = _mkl_packed(weight.contiguous(), len(x))
    if mkl is not None:
        original = weight.contiguous()
        variants["MKL packed"] = lambda: torch.ops.mkl._mkl_linear(x, mkl, original, None, len(x))
    if (CPP.why_unavailable() is None) and cpu_kernels.isa() != "portable":
        variants["own kernel"] = _own_kernel(x, weight, out)
    expected = x @ weight.T
    for name, run in variants.items():
        result = run()
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    return variants


def _own_kernel(x: Tensor, weight: Tensor, out: Tensor) -> Callable[[], Tensor]:
    """As the engine calls it: forward on a packed weight, the input gradient on the weight as it lies."""
    apart = torch.empty(len(x), x.shape[1] + ROW_PADDING)[:, : x.shape[1]].copy_(x)
    packed = cpu_kernels.pack_weight(weight) if weight.is_contiguous() else None

    def run() -> Tensor:
        if packed is not None:
            cpu_kernels.linear_fwd(apart, packed, None, None, out)
        else:
            cpu_kernels.linear_bwd(apart, weight.T, out)
        return out

    return run


def _onednn_packed(weight: Tensor, rows: int) -> Tensor | None:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def _mkl_packed(weight: Tensor, rows: int) -> Tensor | None:
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight")):
        return None
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return packed


def compare_products(rows: int, rounds: int) -> list[dict[str, Any]]:
    """Every weight, forward and input gradient, in every variant."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, (wide, narrow) in SHAPES.items():
        weight = torch.randn(wide, narrow, generator=generator)
        for direction, w in (("forward", weight), ("backward", weight.T)):
            x = torch.randn(rows, w.shape[1], generator=generator)
            variants = product_variants(x, w)
            for run in variants.values():
                run()
            timings = interleave(variants, rounds=rounds, max_seconds=1)
            flops = 2.0 * x.numel() * len(w)
            found += [
                {
                    "rows": rows,
                    "product": name,
                    "direction": direction,
                    "variant": variant,
                    "seconds": t.best,
                    "gflops": flops / t.best / 1e9,
                }
                for variant, t in timings.items()
            ]
    return found


class Schedule:
    """All layers' GEMMs, forward and input gradients, over a set of rows, on this thread's settings."""

    def __init__(self, weights: list[dict[str, Tensor]], rows: int) -> None:
        self.weights = weights
        self.buffers = {width: torch.randn(rows, width) for width in (D, 3 * D, 4 * D)}
        self.out = {width: torch.empty(rows, width) for width in (D, 3 * D, 4 * D)}

    def run(self, start: int = 0, end: int | None = None) -> None:
        for layer in self.weights:
            for w in layer.values():
                torch.mm(self.buffers[w.shape[1]][start:end], w.T, out=self.out[w.shape[0]][start:end])
        for layer in reversed(self.weights):
            for w in layer.values():
                torch.mm(self.buffers[w.shape[0]][start:end], w, out=self.out[w.shape[1]][start:end])


class Workers:
    """Threads that take panels of rows through all layers, each with single-threaded GEMMs, without barriers.

    The threads stay: torch keeps the number of threads per thread, and OpenMP's start-up is not what is measured.
    """

    def __init__(self, schedule: Schedule, panels: list[tuple[int, int]], threads: int) -> None:
        self.schedule, self.panels = schedule, panels
        self.start, self.done = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
        self.next, self.lock, self.stop = 0, threading.Lock(), False
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def run(self) -> None:
        self.next = 0
        self.start.wait()
        self.done.wait()

    def close(self) -> None:
        self.stop = True
        self.start.wait()
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread alone
        while True:
            self.start.wait()
            if self.stop:
                return
            while True:
                with self.lock:
                    mine, self.next = self.next, self.next + 1
                if mine >= len(self.panels):
                    break
                self.schedule.run(*self.panels[mine])
            self.done.wait()


def compare_schedules(rows: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Whole layers with the library's threads, against panels."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(LAYERS)
    ]
    schedule = Schedule(weights, rows)
    # Setting a thread's number of threads in another thread must not change it here: measured first, restored after.
    pools = {
        f"{threads} panels": Workers(schedule, _panels(rows, -(-rows // threads)), threads),
        f"panels of {PANEL_ROWS}": Workers(schedule, _panels(rows, PANEL_ROWS), threads),
    }
    variants: Variants = {"whole layers": lambda: _with_threads(threads, schedule.run)}
    variants |= {name: pool.run for name, pool in pools.items()}
    for run in variants.values():
        run()
    timings = interleave(variants, rounds=rounds, max_seconds=15)
    for pool in pools.values():
        pool.close()
    torch.set_num_threads(threads)
    flops = 4.0 * rows * LAYERS * sum(a * b for a, b in SHAPES.values())
    return [
        {"rows": rows, "schedule": name, "seconds": t.best, "gflops": flops / t.best / 1e9}
        for name, t in timings.items()
    ]


def _with_threads(threads: int, action: Callable[[], None]) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    action()


def _panels(rows: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    began = time.time()
    with torch.no_grad():
        products = [row for rows in options.rows for row in compare_products(rows, options.rounds)]
        schedules = [
            row for rows in options.rows for row in compare_schedules(rows, options.rounds, options.threads)
        ]
    _print_products(products)
    _print_schedules(schedules)
    machine = describe_machine()
    print(f"{one_line(machine)}; {time.time() - began:.0f} s")
    if options.out is not None:
        values = {"machine": machine, "products": products, "schedules": schedules}
        options.out.write_text(json.dumps(values, indent=1) + "\n")


def _print_products(found: list[dict[str, Any]]) -> None:
    variants = list(dict.fromkeys(row["variant"] for row in found))
    rows = []
    for key in dict.fromkeys((row["rows"], row["direction"], row["product"]) for row in found):
        same = {r["variant"]: r["gflops"] for r in found if (r["rows"], r["direction"], r["product"]) == key}
        rows.append(
            [f"{key[0]} {key[1]} {key[2]}", *(f"{same[v]:.0f}" if v in same else "-" for v in variants)]
        )
    print_table(["GFLOP/s of one product", *variants], rows)
    # What a whole tower would take: every product once a layer, forward and backward.
    totals = []
    for count in dict.fromkeys(row["rows"] for row in found):
        mine = [row for row in found if row["rows"] == count]
        sums = {v: sum(r["seconds"] for r in mine if r["variant"] == v) for v in variants}
        best = sum(
            min(r["seconds"] for r in mine if (r["direction"], r["product"]) == key)
            for key in {(r["direction"], r["product"]) for r in mine}
        )
        totals.append(
            [str(count), *(f"{sums[v] / sums['mm']:.3f}" for v in variants), f"{best / sums['mm']:.3f}"]
        )
    print_table(["All products, time over mm, rows", *variants, "best of each"], totals)


def _print_schedules(found: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["schedule"] for row in found))
    rows = []
    for count in dict.fromkeys(row["rows"] for row in found):
        same = {row["schedule"]: row for row in found if row["rows"] == count}
        rows.append([str(count), *(f"{same[n]['seconds']:.3f} s ({same[n]['gflops']:.0f})" for n in names)])
    print_table(["All layers, seconds (GFLOP/s), rows", *names], rows)


if __name__ == "__main__":
    main()
