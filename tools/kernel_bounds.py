"""What bounds each Triton kernel of a training step: the rate at which instructions are issued, or the memory's bandwidth.

    python tools/kernel_bounds.py                        # K = 1000, one image, on the GPUs that docs/kernels.md has
    python tools/kernel_bounds.py --classes 100 --batch 8

No GPU is needed, and nothing is computed: a step of CLIP's ViT-B/16 text tower goes over tensors without memory, and
every launch is compiled instead of done. Of a launch that gives the grid, the machine code and the bytes of its arguments.

    time by issue = programs x warps x instructions of a warp / (multiprocessors x 4 schedulers x clock)
    time by bandwidth = bytes read and written / bandwidth

Both are least times: schedulers that issue in every cycle, a memory at its peak. The larger is the bound. A loop is
counted once, except attention's over the keys of a tile, whose length is known from its plan. Of a tensor that is read, or
written, no more bytes count than it has, and no more than the programs' loads and stores move; what several programs read
comes from the caches after the first.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import inf, prod
from typing import Any

import compile_kernels  # first: it keeps Triton out of the interpreter
import machine_code
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton_without_gpu import target_of_launches

from cocoop_fast.engine.constants import compute_constants
from cocoop_fast.engine.fused_tower import shape_pass
from cocoop_fast.measure.devices import find_gpu
from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names, random_text_tower
from cocoop_fast.ops import triton as ops
from cocoop_fast.ops import triton_small as small

# The GPUs, their architectures, and their boost clocks in GHz: the data sheets of each.
GPUS = {"A100": ("sm_80", 1.41), "H100": ("sm_90", 1.98)}
SCHEDULERS = 4  # of a multiprocessor, each issues one instruction of a warp in a cycle
TEXT = """## What bounds a launch

Of the Triton launches of a step at K = 1000, B = 1, ViT-B/16's text tower in fp16: the least time by the rate at which
instructions are issued (programs x warps x instructions of a warp, of the machine code; four schedulers a multiprocessor at
the boost clock) and by the memory's bandwidth at its peak (bytes of the arguments, read and written). The larger of the
two is the prediction; a launch costs some 2 µs besides. The launches are those of a tower of two layers, the times those of
a kernel's longest launch.
`python tools/kernel_bounds.py` has other sizes.
"""


@dataclass(frozen=True)
class Launch:
    """One launch of a step.

    Args:
        kernel: its name, as a Variant's.
        warps: of all programs together.
        code: its machine code.
        trips: how often its loops are passed through, on the average.
        nbytes: read and written.
    """

    kernel: str
    warps: int
    code: machine_code.MachineCode
    trips: float
    nbytes: float

    @property
    def instructions(self) -> float:
        """Of all warps."""
        return self.warps * self.code.issued(self.trips)


@dataclass(frozen=True)
class Bound:
    """The least times of a launch on a GPU, in seconds."""

    issue: float
    bandwidth: float

    @property
    def larger(self) -> float:
        return max(self.issue, self.bandwidth)


def bound(launch: Launch, gpu: str) -> Bound:
    """On one of GPUS."""
    sheet, clock = find_gpu(gpu), GPUS[gpu][1]
    rate = sheet.units * SCHEDULERS * clock * 1e9
    return Bound(launch.instructions / rate, launch.nbytes / (sheet.bandwidth_gbs * 1e9))


def launches_of_step(
    classes: int, batch: int, target: str, dtype: torch.dtype = torch.float16
) -> list[Launch]:
    """Those of forward and backward of a tower of two layers, of logits and loss, and of Meta-Net and report.

    Args:
        classes: of ImageNet's, the first.
        batch: images.
        target: one of compile_kernels.ALL_TARGETS, of NVIDIA.
        dtype: of the tower.
    """
    problem = build_problem(ProblemSpec(imagenet_names(classes), 1), random_text_tower(layers=2))
    meta = torch.device("meta")
    with torch.no_grad():
        constants = compute_constants(problem.weights.to(meta, dtype), problem.tree)
    with recorded(target) as found:
        shape_pass(constants, ops, batch, keeps=True)
        text = torch.empty(
            batch, classes, problem.weights.projection.weight.shape[1], dtype=dtype, device=meta
        )
        image = text.new_empty(batch, text.shape[2])
        _head(text, image)
        _small(image, problem.weights.width, classes)
    return found


def _head(text: Tensor, image: Tensor) -> None:
    """Logits, loss and their gradients."""
    one = image.new_empty(1, dtype=torch.float32)
    logits, norms, d_logits = (one.new_empty(text.shape[:2]) for _ in range(3))
    label = torch.empty(len(image), dtype=torch.int64, device=image.device)
    ops.head_fwd(text, image, one, logits, norms)
    ops.cross_entropy_fwd(logits, label, one)
    ops.cross_entropy_bwd(logits, label, one, d_logits)
    ops.head_bwd(text, image, one, logits, norms, d_logits, torch.empty_like(text))


def _small(image: Tensor, width: int, classes: int) -> None:
    """The Meta-Net in fp32 with the length of what it reads, and the report on its gradients and those of four context
    vectors."""
    f = partial(torch.empty, device=image.device)
    batch, inner = image.shape
    weights = f(inner // 16, inner), f(inner // 16), f(width, inner // 16), f(width)
    u, shift = f(batch, inner // 16), f(batch, width)
    small.unit_rows(image, image)
    small.meta_net_fwd(image, *weights, u, shift)
    small.meta_net_bwd(image, weights[2], u, shift, *weights)
    gradients = (f(4, width), *weights)
    copies, one = f(sum(each.numel() for each in gradients)), f(())
    label, shared = f(batch, dtype=torch.int64), f(3, dtype=torch.int32)
    small.step_report(one, f(batch, classes), label, one, gradients, copies, shared, f(5))


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Launches are compiled for a target and noted, not done."""
    found: list[Launch] = []
    codes: dict[int, machine_code.MachineCode] = {}
    run = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        code = codes.setdefault(id(compiled), machine_code.read(compiled.asm["cubin"]))
        given = dict(zip(self.arg_names, args, strict=False)) | options
        programs = prod(grid)
        name = self.fn.__name__.removeprefix("_").removesuffix("_kernel")
        nbytes = traffic(compiled.asm["ttir"], given, programs)
        found.append(Launch(name, programs * options["num_warps"], code, _trips(given), nbytes))

    JITFunction.run = note
    try:
        with target_of_launches(compile_kernels.ALL_TARGETS[target]):
            yield found
    finally:
        JITFunction.run = run


def _trips(given: dict[str, Any]) -> float:
    """Of attention: the keys of a tile, KEYS at a time."""
    if "slot_row" not in given or "KEYS" not in given:
        return 1.0
    chunks, slots = given["slot_row"].shape
    return float(chunks / (len(given["tile_query"]) - 1) * slots / given["KEYS"])


# In Triton's own language: what a name is made from, and what is read and written through pointers.
DEFINED = re.compile(r"^(%\w+)(?::\d+)? = ([\w.]+) (.*)$")
MOVED = re.compile(r"^(?:%\w+ = )?tt\.(load|store) (%\w+)[^:]* : (?:tensor<([\dx]+)x)?!tt\.ptr<\w?(\d+)>")
SHARED = re.compile(
    r"^%\w+ = tt\.atomic_rmw \w+, \w+, \w+, (%\w+), .* : \(!tt\.ptr<\w?(\d+)>,"
)  # one number, both ways
MADE_OF_ONE = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape")


def traffic(ttir: str, given: dict[str, Any], programs: int) -> float:
    """Bytes that a launch reads and writes.

    Args:
        ttir: of the kernel.
        given: its arguments by name.
        programs: how many run.

    Raises:
        ValueError: something is read or written and no argument is seen to be what it belongs to.
    """
    sources: dict[str, tuple[str, ...]] = {}
    moved: dict[tuple[str, Any], float] = Counter()
    sizes: dict[tuple[str, Any], int] = {}
    loops = 0
    for line in map(str.strip, ttir.splitlines()):
        loops += line.count("{") - line.count("}") if loops or "scf.for" in line or "scf.while" in line else 0
        if defined := DEFINED.match(line):
            names = re.findall(r"%\w+", defined[3])
            if defined[2] in MADE_OF_ONE:
                sources[defined[1]] = tuple(names[:1])
            elif defined[2] == "arith.select":
                sources[defined[1]] = tuple(names[1:3])
        if found := MOVED.match(line):
            numbers = prod(map(int, found[3].split("x"))) if found[3] else 1
            for argument in _arguments(found[2], sources, given):
                tensor = given[argument]
                place = found[1], (id(tensor), tensor.shape)
                moved[place] += inf if loops else programs * numbers * int(found[4]) / 8
                sizes[place] = tensor.numel() * tensor.element_size()
        elif found := SHARED.match(line):
            for way, argument in product(("load", "store"), _arguments(found[1], sources, given)):
                tensor = given[argument]
                place = way, (id(tensor), tensor.shape)
                moved[place] += programs * int(found[2]) / 8
                sizes[place] = tensor.numel() * tensor.element_size()
        elif re.match(r"(%\w+ = )?tt\.(load|store|atomic)", line):
            raise ValueError(f"what does this read or write? {line}")
    return sum(min(size, sizes[place]) for place, size in moved.items())


def _arguments(name: str, sources: dict[str, tuple[str, ...]], given: dict[str, Any]) -> set[str]:
    """The arguments that a pointer may point into."""
    if name[1:] in given:
        return {name[1:]}
    if name not in sources:
        raise ValueError(f"where does {name} point to?")
    return {argument for one in sources[name] for argument in _arguments(one, sources, given)}


def table(classes: int, batch: int) -> str:
    """A line a kernel, in Markdown; its longest launch."""
    head = ["kernel", "launches", "loads: bits", "tensor cores"]
    head += [f"{gpu}, µs by {what}" for gpu in GPUS for what in ("issue", "bandwidth", "the larger")]
    found = {gpu: launches_of_step(classes, batch, target) for gpu, (target, _) in GPUS.items()}
    first = next(iter(found.values()))
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for kernel in dict.fromkeys(one.kernel for one in first):
        cells = []
        for gpu, own in found.items():
            bounds = [bound(one, gpu) for one in own if one.kernel == kernel]
            most = max(bounds, key=lambda one: one.larger)
            by = "issue" if most.issue > most.bandwidth else "bandwidth"
            cells += [
                f"{1e6 * most.issue:.2g}",
                f"{1e6 * most.bandwidth:.2g}",
                f"{1e6 * most.larger:.2g} ({by})",
            ]
        of_it = [one for one in first if one.kernel == kernel]
        widths = " ".join(map(str, sorted({bits for one in of_it for bits in one.code.widths("LDG")})))
        cores = str(of_it[0].code.count("HMMA"))
        lines.append([f"`{kernel}`", str(len(of_it)), widths, cores, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section() -> str:
    """Of docs/kernels.md."""
    with tempfile.TemporaryDirectory() as cache:  # an old result is no proof
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            found = table(1000, 1)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
    return f"{TEXT}\n{found}\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=1000, help="K; default: 1000")
    parser.add_argument("--batch", type=int, default=1, help="B; default: 1")
    options = parser.parse_args()
    print(table(options.classes, options.batch))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
