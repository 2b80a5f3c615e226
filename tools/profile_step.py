"""Where a training step's time goes, op by op.

    python tools/profile_step.py --k 100            # the engine over 100 ImageNet names, one image
    python tools/profile_step.py --k 1000 --forward # the forward pass alone

Timers are put around the C++ kernels and torch's matrix multiplications from outside, for the time of the profile;
the engine knows nothing of them. They cost about a microsecond a call. What they do not see is the last line. Passes are not
recorded meanwhile, since a recording makes no calls that a timer could see; so a real step has less of that last line.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cocoop_fast.cli.output import print_table
from cocoop_fast.errors import UserError
from cocoop_fast.measure.contestants import BY_NAME, Runner
from cocoop_fast.measure.machine import describe_machine, one_line
from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names
from cocoop_fast.ops import cpu as cpu_kernels

GEMMS = (
    *("mm", "addmm", "matmul", "bmm", "__matmul__"),
    *("linear_fwd", "linear_bwd", "linear_activation_fwd", "linear_activation_bwd"),
)
# Whatever else of torch moves rows about; whether the engine uses it or not.
OTHER_TORCH = ("add", "cat", "mul", "index_select")
TENSOR_METHODS = ("copy_", "add_", "__matmul__")


@dataclass
class Op:
    """What one operation cost, over all its calls."""

    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Profile:
    """Operations by name. Calls inside a timed call count as part of it."""

    ops: dict[str, Op] = field(default_factory=dict)
    busy: bool = False

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` with a timer around it. GEMMs are told apart by the shape of the weight."""
        is_gemm = name in GEMMS

        def wrapper(*arguments: Any, **options: Any) -> Any:
            if self.busy:
                return call(*arguments, **options)
            self.busy = True
            start = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                seconds = time.perf_counter() - start
                self.busy = False
                tensors = [t for t in (*arguments, *options.values()) for t in _tensors(t)]
                op = self.ops.setdefault(_label(name, tensors) if is_gemm else name, Op())
                op.calls += 1
                op.seconds += seconds
                if is_gemm:
                    x, weight = _factors(tensors)
                    op.flops += 2.0 * x.numel() * _columns(name, weight)
                else:
                    op.bytes += sum(t.numel() * t.element_size() for t in tensors)

        return wrapper

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Put the timers in place, and take them away again."""
        places: list[tuple[Any, str, str]] = [
            (torch, name, name) for name in (*GEMMS, *OTHER_TORCH) if hasattr(torch, name)
        ]
        places += [(torch.Tensor, name, name) for name in TENSOR_METHODS]
        for name, member in vars(cpu_kernels).items():
            if (
                inspect.isfunction(member)
                and not name.startswith("_")
                and member.__module__ == cpu_kernels.__name__
            ):
                places.append((cpu_kernels, name, name))
        attention = cpu_kernels.TreeAttention
        places += [(attention, name, f"TreeAttention.{name}") for name in ("forward", "backward")]
        changed = [(owner, name) for owner, name, _ in places] + [(cpu_kernels, "record")]
        originals = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name in changed]
        for owner, name, label in places:
            setattr(owner, name, self.timed(label, getattr(owner, name)))
        cpu_kernels.record = None
        try:
            yield
        finally:
            for owner, name, original in originals:
                delattr(owner, name) if original is _ABSENT else setattr(owner, name, original)


_ABSENT = object()  # inherited, so what was set over it is removed again


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _factors(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of a product; addmm has what is added before them, out= the result behind."""
    for x, weight in itertools.pairwise(tensors):
        if x.ndim >= 2 and weight.ndim >= 2 and x.shape[-1] == weight.shape[-2] and x is not weight:
            return x, weight
    raise ValueError("a product without two factors")


def _label(name: str, tensors: list[torch.Tensor]) -> str:
    x, weight = _factors(tensors)
    return f"{name} {x.numel() // x.shape[-1]}×{x.shape[-1]}×{_columns(name, weight)}"


def _columns(name: str, weight: torch.Tensor) -> int:
    """Of the product; the engine's packed weights are panels of columns, (panels, inner, 32)."""
    packed = name in ("linear_fwd", "linear_activation_fwd")
    return weight.shape[0] * weight.shape[-1] if packed else weight.shape[-1]


def profile(runner: Runner, *, steps: int = 5, forward: bool = False) -> tuple[Profile, float]:
    """Profile steps (or forward passes) after one to warm up.

    Returns:
        The profile, and the seconds of all steps together.
    """
    run = runner.forward if forward else runner.step
    run()
    found = Profile()
    with found.watch():
        start = time.perf_counter()
        for _ in range(steps):
            run()
        seconds = time.perf_counter() - start
    return found, seconds


def table(found: Profile, seconds: float, steps: int) -> list[dict[str, Any]]:
    """One row an operation, the longest first, then what no timer saw."""
    rows: list[dict[str, Any]] = []
    for name, op in sorted(found.ops.items(), key=lambda item: -item[1].seconds):
        rows.append(
            {
                "op": name,
                "calls": op.calls / steps,
                "ms": 1e3 * op.seconds / steps,
                "share": op.seconds / seconds,
                "gflops": op.flops / op.seconds / 1e9 if op.flops else None,
                "gbytes": op.bytes / op.seconds / 1e9 if op.bytes else None,
            }
        )
    rest = seconds - sum(op.seconds for op in found.ops.values())
    rows.append(
        {
            "op": "unaccounted",
            "calls": None,
            "ms": 1e3 * rest / steps,
            "share": rest / seconds,
            "gflops": None,
            "gbytes": None,
        }
    )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--k", type=int, default=100, help="ImageNet class names (default 100)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--model", help="as for cocoop-fast bench")
    parser.add_argument("--pretrained", help="as for cocoop-fast bench")
    parser.add_argument("--contestant", default="engine", choices=sorted(BY_NAME))
    parser.add_argument("--forward", action="store_true", help="the forward pass alone")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        spec = ProblemSpec(
            imagenet_names(options.k), options.batch_size, model=options.model, pretrained=options.pretrained
        )
        problem = build_problem(spec)
    except UserError as error:
        parser.error(str(error))
    found, seconds = profile(
        BY_NAME[options.contestant].build(problem), steps=options.steps, forward=options.forward
    )
    rows = table(found, seconds, options.steps)
    if options.json:
        print(json.dumps({"machine": describe_machine(), "seconds": seconds / options.steps, "ops": rows}))
        return
    columns = ["Op", "Calls", "ms a step", "Share", "GFLOP/s", "GB/s"]
    print_table(columns, [_format(row) for row in rows])
    gemms = sum(op.flops for op in found.ops.values()) / options.steps
    print(f"{1e3 * seconds / options.steps:.1f} ms in all, {gemms / 1e9:.1f} GFLOP in GEMMs.")
    print("GEMMs by rows × inner × columns. GB/s: the tensors handed over, read or written once.")
    print(one_line(describe_machine()))


def _format(row: dict[str, Any]) -> list[str]:
    calls, gflops, gbytes = row["calls"], row["gflops"], row["gbytes"]
    return [
        row["op"],
        "" if calls is None else f"{calls:g}",
        f"{row['ms']:.2f}",
        f"{row['share']:.1%}",
        "" if gflops is None else f"{gflops:.0f}",
        "" if gbytes is None else f"{gbytes:.1f}",
    ]


if __name__ == "__main__":
    main()
