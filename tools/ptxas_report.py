"""Compile every CUDA kernel for each architecture, without a GPU, and read what ptxas says that it uses.

    python tools/ptxas_report.py                 # all architectures that setup.py builds for
    python tools/ptxas_report.py --arch 90       # this one

Exit status 1 if a kernel does not compile or spills registers to local memory, 2 without nvcc.
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernel_resources import Resources

CSRC = Path(__file__).parents[1] / "csrc"
TOOLKIT = runpy.run_path(str(CSRC / "cuda" / "nvcc.py"))  # the flags are those of setup.py

# A kernel's first template argument as C++ mangles it -> how its rows are stored, and what else tells it from others.
ROWS = {
    "6__half": ("fp16", ""),
    "13__nv_bfloat16": ("bf16", ""),
    "f": ("fp32", ""),
    "5uint4": ("any", "16 bytes at a time"),
    "j": ("any", "4 bytes at a time"),
    "t": ("any", "2 bytes at a time"),
}
NAME = re.compile(r"\d([a-z][a-z_]*)_kernelI(" + "|".join(ROWS) + r")(?:Li(\d+))?E")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\d+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def compile_all(
    nvcc: str, architectures: Sequence[int], jobs: int, sources: Sequence[Path] | None = None
) -> list[Resources]:
    """What every kernel uses on every architecture; a source that does not compile is one entry with a failure."""
    work = [(source, number) for source in sources or TOOLKIT["sources"]() for number in architectures]
    with ThreadPoolExecutor(jobs) as pool:
        return [one for found in pool.map(lambda job: _compile(nvcc, *job), work) for one in found]


def cuda_sections(jobs: int) -> list[tuple[str, str, list[Resources]]]:
    """Title, text and resources of each source, for docs/kernels.md. The text is the comment that it begins with.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    nvcc = TOOLKIT["find_nvcc"]()
    if nvcc is None:
        raise FileNotFoundError("no nvcc: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    found = compile_all(nvcc, TOOLKIT["architectures_of"](nvcc), jobs)
    return [
        (
            f"{source.stem} (CUDA C++)",
            _first_comment(source),
            [one for one in found if one.module == source.stem],
        )
        for source in TOOLKIT["sources"]()
    ]


def parse(report: str, module: str, target: str) -> list[Resources]:
    """The kernels in ptxas' output.

    Raises:
        ValueError: there is a kernel whose name is not understood, or whose figures are not all there.
    """
    found = []
    for match in REPORT.finditer(report):
        name = NAME.search(match["name"])
        if name is None:
            raise ValueError(f"no kernel has the name {match['name']}")
        dtype, variant = ROWS[name[2]]
        width = int(name[3] or 0)
        if width:
            variant = f"{width} lanes a key" if module == "tree_attention" else f"{width} numbers at a time"
        found.append(
            Resources(
                module=module,
                kernel=name[1],
                dtype=dtype,
                name=variant,
                target=target,
                registers=int(match["registers"]),
                shared_bytes=_static_shared(match["rest"]) + _dynamic_shared(name[1], dtype, width),
                local_bytes=max(int(match[key]) for key in ("stack", "stores", "loads")),
            )
        )
    if len(found) != report.count("Compiling entry function"):
        raise ValueError(
            f"ptxas names {report.count('Compiling entry function')} kernels, {len(found)} were read"
        )
    return found


def _compile(nvcc: str, source: Path, architecture: int) -> list[Resources]:
    target = f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc,
            *TOOLKIT["FLAGS"],
            f"-I{CSRC}",
            f"-gencode=arch=compute_{architecture},code={target}",
        ]
        command += ["-Xptxas", "-v", "-cubin", str(source), "-o", f"{folder}/kernels.cubin"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        reason = lines[0] if lines else f"nvcc exited with status {result.returncode}"
        return [Resources(source.stem, source.stem, "", "", target, failure=reason)]
    return parse(result.stderr, source.stem, target)


def _static_shared(figures: str) -> int:
    match = re.search(r"(\d+) bytes smem", figures)
    return int(match[1]) if match else 0


def _dynamic_shared(kernel: str, dtype: str, width: int) -> int:
    """The most that a launcher asks for, by the limits in the sources."""
    size = 4 if dtype == "fp32" else 2
    if kernel in ("tree_attention_fwd", "tree_attention_bwd_query"):
        largest_head = 8 * width  # eight numbers a lane
        return 2 * _constant("tree_attention.cu", "kMostStaged") * largest_head * size
    if kernel == "assemble_prompts_fwd":
        return 4 * (_constant("kernels.h", "kMaxWidth") + 4)
    return 0


def _constant(file: str, name: str) -> int:
    match = re.search(rf"{name} = (\d+);", (CSRC / "cuda" / file).read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{file} has no constant {name}")
    return int(match[1])


def _first_comment(source: Path) -> str:
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if not line.startswith("//"):
            break
        lines.append(line[2:].removeprefix(" "))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, action="append", help="compute capability, such as 90")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args()
    nvcc = TOOLKIT["find_nvcc"]()
    if nvcc is None:
        print("ptxas_report: no nvcc: install the CUDA toolkit, or set CUDACXX or CUDA_HOME", file=sys.stderr)
        return 2
    found = compile_all(nvcc, options.arch or TOOLKIT["architectures_of"](nvcc), options.jobs)
    for one in found:
        print(f"{one}: {one.registers} registers, {one.shared_bytes} shared, {one.local_bytes} local")
    problems = [f"{one} {problem}" for one in found if (problem := one.problem())]
    print("\n".join(problems) or f"{len(found)} kernels, none spills", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
