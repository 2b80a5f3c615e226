"""Compiles the CPU kernels with a program that checks them (tests/ops/native), and runs it: no torch is needed.

    python tools/check_kernels.py           # what this machine's processor runs; CXX chooses the compiler
    python tools/check_kernels.py --arm     # ARM's, by a cross compiler, under user-mode emulation

Every operation of every instruction set is called on random shapes and compared with plain loops in double precision; the
bits must be the same for 1, 2, 3 and 7 threads, nothing may be written beside a result or read behind an array. Of ARM's
product, the instructions of the inner loop are counted in the machine code.
"""

from __future__ import annotations

import argparse
import ast
import collections
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests/ops/native/check_kernels.cpp"
ARM_COMPILER, ARM_EMULATORS = "aarch64-linux-gnu-g++", ("qemu-aarch64", "qemu-aarch64-static")
ARM_PACKAGES = "g++-aarch64-linux-gnu and qemu-user of Debian and Ubuntu"


def build_settings(name: str) -> Any:
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py has no {name}")


def run(command: list[str], code: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=code, capture_output=True, text=True)


def compile_program(compiler: str, csrc: Path, work: Path, link: list[str]) -> Path:
    """The program with the kernels of every instruction set that the compiler knows, as setup.py compiles them."""
    flags = [*build_settings("FLAGS"), f"-I{csrc}"]
    sets = {
        suffix: set_flags
        for suffix, (set_flags, macro) in build_settings("INSTRUCTION_SETS").items()
        if not run(
            [compiler, *set_flags, "-x", "c++", "-fsyntax-only", "-"], f"#ifndef {macro}\n#error\n#endif\n"
        ).returncode
    }
    if not run([compiler, "-fopenmp", "-x", "c++", "-fsyntax-only", "-"], "#include <omp.h>\n").returncode:
        flags += ["-fopenmp"]
        link = [*link, "-fopenmp"]
    flags += [f"-DCOCOOP_FAST_HAVE{suffix.upper()}=1" for suffix in sets]

    sources = {path: list[str]() for path in (csrc / "cpu/dispatch.cpp", csrc / "cpu/cpu_features.cpp")}
    sources |= {csrc / "cpu/attention_plan.cpp": [], csrc / "cpu/kernels_portable.cpp": [], PROGRAM: ["-O1"]}
    sources |= {csrc / f"cpu/kernels{suffix}.cpp": set_flags for suffix, set_flags in sets.items()}

    def compile_one(source: Path) -> str:
        target = str(work / f"{source.stem}.o")
        result = run([compiler, *flags, *sources[source], "-c", str(source), "-o", target])
        if result.returncode:
            sys.exit(f"check_kernels: {compiler} failed on {source}:\n{result.stderr}")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = work / "check_kernels"
    result = run([compiler, *objects, *link, "-o", str(program)])
    if result.returncode:
        sys.exit(f"check_kernels: {compiler} failed to link:\n{result.stderr}")
    return program


def product_loop(objdump: str, kernels: Path) -> collections.Counter[str] | None:
    """Instructions by name in the innermost loop with the most multiply-adds; "stack": those that touch the stack."""
    text = run([objdump, "-d", "--no-show-raw-insn", str(kernels)]).stdout
    best: collections.Counter[str] | None = None
    for function in text.split("\n\n"):
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", function, re.MULTILINE)
        place = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
        begin = 0  # of a stretch without branches
        for i, (_, name, operands) in enumerate(lines):
            if not re.match(r"(b|b\..*|cbn?z|tbn?z|j.*|ret|bl)$", name):
                continue
            target = re.search(r"\b([0-9a-f]+) <", operands)
            first = place.get(int(target[1], 16), -1) if target else -1
            if begin <= first <= i:
                loop = lines[first : i + 1]
                counts = collections.Counter(name.split(".")[0] for _, name, _ in loop)
                counts["stack"] = sum(bool(re.search(r"\[sp|%rsp", operands)) for _, _, operands in loop)
                counts["all"] = len(loop)
                if best is None or counts["fmla"] > best["fmla"]:
                    best = counts
            begin = i + 1
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the compiled CPU kernels without Python's help.")
    parser.add_argument("--arm", action="store_true", help="ARM's, cross-compiled and emulated")
    parser.add_argument("--calls", type=int, default=40, help="of each operation (default 40)")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="other sources")
    given = parser.parse_args()
    compiler, emulator, link = os.environ.get("CXX", "g++"), [], list[str]()
    if given.arm and platform.machine() not in ("aarch64", "arm64"):
        compiler, link = ARM_COMPILER, ["-static"]
        emulator = [found for name in ARM_EMULATORS if (found := shutil.which(name))][:1]
        if not emulator or not shutil.which(compiler):
            missing = " and ".join(
                [compiler] * (not shutil.which(compiler)) + [ARM_EMULATORS[0]] * (not emulator)
            )
            print(f"check_kernels: no {missing} here; they are in {ARM_PACKAGES}", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(compiler, given.csrc, Path(folder), link)
        widest = ["neon"] if given.arm else []
        # More threads than processors are no reason to spin while they wait for each other.
        status = subprocess.run(
            [*emulator, str(program), str(given.calls), *widest],
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        ).returncode
        objdump = compiler.removesuffix("g++") + "objdump"
        if (
            given.arm
            and shutil.which(objdump)
            and (loop := product_loop(objdump, Path(folder, "kernels_neon.o")))
        ):
            print(
                f"the product's inner loop: {loop['fmla']} multiply-adds in {loop['all']} instructions, "
                f"of which {loop['stack']} touch the stack"
            )
    if status < 0:
        print(
            f"check_kernels: the program was ended by signal {-status}: memory that is not an array's was used"
        )
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
