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
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton loads

import triton
from kernel_resources import UNSERVED, Resources
from machine_code import NVIDIA_TOOLS
from triton.backends.compiler import GPUTarget
from triton_without_gpu import compile_launch, serves

import cocoop_fast.kernels
from cocoop_fast.kernels.variants import STORAGE, Variant

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


def compile_all(
    modules: Sequence[str],
    targets: Sequence[str],
    jobs: int,
    *,
    widest: bool = False,
    dtypes: Sequence[str] = STORAGE,
) -> list[Resources]:
    """Compile all variants of these modules for these targets, in `jobs` processes.

    Args:
        modules: that have VARIANTS.
        targets: some of ALL_TARGETS.
        jobs: processes.
        widest: only the last variant of each kernel and dtype, which is that of the widest rows.
        dtypes: only variants whose rows are stored so.
    """
    work = [
        (module, index, target)
        for module in modules
        for index in _chosen(importlib.import_module(module).VARIANTS, widest, dtypes)
        for target in targets
    ]
    found: dict[tuple[str, int, str], Resources] = {}
    for target in targets:
        if not serves(ALL_TARGETS[target]):
            unserved = [one for one in work if one[2] == target]
            found |= {one: Resources(*_identity(*one), failure=UNSERVED) for one in unserved}
    with tempfile.TemporaryDirectory() as cache:  # an old result is no proof
        while left := [one for one in work if one not in found]:
            _compile_in_pool(left, found, jobs, cache)
            if jobs == 1 and (crashed := next((one for one in left if one not in found), None)):
                found[crashed] = Resources(*_identity(*crashed), failure="the compiler crashed")
            jobs = 1  # where one crashed, which one is seen by one at a time
    return [found[one] for one in work]


def _compile_in_pool(
    work: Sequence[tuple[str, int, str]],
    found: dict[tuple[str, int, str], Resources],
    jobs: int,
    cache: str,
) -> None:
    """Compile these; what had not ended when a compiler took its process along is not among the found."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, partial(_prepare, cache)) as pool, suppress(BrokenProcessPool):
        futures = [pool.submit(_compile_one, *one) for one in work]
        for one, future in zip(work, futures, strict=True):
            found[one] = future.result()


def _chosen(variants: Sequence[Variant], widest: bool, dtypes: Sequence[str] = STORAGE) -> list[int]:
    """Their numbers."""
    wanted = {number: one for number, one in enumerate(variants) if one.dtype in dtypes}
    if not widest:
        return list(wanted)
    return list({(one.kernel_name, one.dtype): number for number, one in wanted.items()}.values())


def _prepare(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # compiled as it would be launched


def _compile_one(module: str, index: int, target: str) -> Resources:
    variant: Variant = importlib.import_module(module).VARIANTS[index]
    identity = _identity(module, index, target)
    try:
        compiled = compile_variant(variant, ALL_TARGETS[target])
    except Exception as error:  # whatever the compilers raise, the others are still to be compiled
        return Resources(*identity, failure=" ".join(f"{type(error).__name__}: {error}".split()))
    return Resources(*identity, **_usage(compiled))


def _identity(module: str, index: int, target: str) -> tuple[str, str, str, str, str]:
    variant: Variant = importlib.import_module(module).VARIANTS[index]
    return (module.rpartition(".")[2], variant.kernel_name, variant.dtype, variant.name, target)


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
            command = [str(NVIDIA_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
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
    parser.add_argument("--widest", action="store_true", help="of each kernel and dtype only the widest rows")
    parser.add_argument("--dtype", action="append", choices=STORAGE, help="only rows of this one; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: the processors")
    options = parser.parse_args()
    modules, targets = options.modules or kernel_modules(), options.target or list(TARGETS)
    found = compile_all(
        modules, targets, options.jobs, widest=options.widest, dtypes=options.dtype or STORAGE
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print(f"{len(found)} kernels compiled with Triton {triton.__version__}")
    return int(report_problems(found))


if __name__ == "__main__":
    raise SystemExit(main())
