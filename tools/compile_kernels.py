"""Compile every variant of every Triton kernel for each GPU family, without one, and read what it uses from the result.

    python tools/compile_kernels.py                                    all kernels
    python tools/compile_kernels.py cocoop_fast.kernels.layer_norm     the kernels of these modules
    python tools/compile_kernels.py --target sm_90 --target gfx90a     for these alone
    python tools/compile_kernels.py --json resources.json              the figures in a file, too

A module of kernels is found by its being in cocoop_fast.kernels and having VARIANTS (cocoop_fast/kernels/variants.py).
Exit status 1 if a variant does not compile, needs more shared memory than the GPU has, or spills registers to local
memory. Triton must not be in its interpreter: TRITON_INTERPRET is removed from the environment.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton loads

import triton
from kernel_resources import Resources
from triton.backends.compiler import GPUTarget
from triton_without_gpu import compile_launch

import cocoop_fast.kernels
from cocoop_fast.kernels.variants import Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Compiled for if asked: their machine code is as that of the others.
OTHER_TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
ALL_TARGETS = TARGETS | OTHER_TARGETS


def kernel_modules() -> list[str]:
    """The modules of cocoop_fast.kernels that have VARIANTS."""
    package = cocoop_fast.kernels
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "VARIANTS")]


def compile_all(modules: Sequence[str], targets: Sequence[str], jobs: int) -> list[Resources]:
    """Compile all variants of these modules for these targets, in `jobs` processes."""
    work = [
        (module, index, target)
        for module in modules
        for index in range(len(importlib.import_module(module).VARIANTS))
        for target in targets
    ]
    with tempfile.TemporaryDirectory() as cache:  # an old result is no proof
        prepare = partial(_prepare, cache)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, prepare) as pool:
            return list(pool.map(_compile_one, *zip(*work, strict=True), chunksize=8))


def _prepare(cache: str) -> None:
    triton.knobs.cache.dir = cache
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # compiled as it would be launched


def _compile_one(module: str, index: int, target: str) -> Resources:
    variant: Variant = importlib.import_module(module).VARIANTS[index]
    identity = (module.rpartition(".")[2], variant.kernel_name, variant.dtype, variant.name, target)
    try:
        compiled = compile_variant(variant, ALL_TARGETS[target])
    except Exception as error:  # whatever the compilers raise, the others are still to be compiled
        return Resources(*identity, failure=" ".join(f"{type(error).__name__}: {error}".split()))
    return Resources(*identity, **_usage(compiled))


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    """Triton's CompiledKernel of a variant, with tensors of less than 2 GB."""
    names = set(variant.kernel.arg_names)
    if missing := names ^ (set(variant.signature) | set(variant.constexprs)):
        raise ValueError(f"{variant}: not the arguments of the kernel: {', '.join(sorted(missing))}")
    if target.backend == "hip":  # for larger tensors it has other instructions, which have to compile as well
        compile_launch(variant, target, nbytes=2**31)
    return compile_launch(variant, target)


def _usage(compiled: Any) -> dict[str, int]:
    """Registers, shared memory and local memory, read from the machine code.

    Local memory is NVIDIA's stack frame and local segment. It is AMD's private segment, and four bytes for each
    spilled register, even one that went into another register.
    """
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing)}
        registers, static = used["REG"], used["SHARED"]
        local = used["STACK"] + used["LOCAL"]
    else:
        at_the_end = r"^ +\.(\w+): +(\d+)$"  # the kernel's metadata, in YAML
        found = re.findall(at_the_end, compiled.asm["amdgcn"], re.MULTILINE)
        used = {name: int(value) for name, value in found}
        registers, static = used["vgpr_count"], used["group_segment_fixed_size"]
        local = used["private_segment_fixed_size"] + 4 * (used["vgpr_spill_count"] + used["sgpr_spill_count"])
    dynamic = compiled.metadata.shared
    return {"registers": registers, "shared_bytes": static + dynamic, "local_bytes": local}


def report_problems(found: Iterable[Resources]) -> bool:
    """Print what is wrong; whether anything is."""
    wrong = [(one, one.problem()) for one in found if one.problem()]
    for one, problem in wrong:
        print(f"{one}: {problem}", file=sys.stderr)
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="modules with VARIANTS; default: all")
    parser.add_argument(
        "--target", action="append", choices=ALL_TARGETS, help="only for this one; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: the processors")
    options = parser.parse_args()
    found = compile_all(options.modules or kernel_modules(), options.target or list(TARGETS), options.jobs)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print(f"{len(found)} kernels compiled with Triton {triton.__version__}")
    return int(report_problems(found))


if __name__ == "__main__":
    raise SystemExit(main())
