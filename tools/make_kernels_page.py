"""Compile every GPU kernel for every target and write docs/kernels.md.

    python tools/make_kernels_page.py              # some minutes

The page has a section for each file of kernels. Its text is what the file begins with, the docstring of a Triton module
or the first comment of a CUDA source: what one program owns, the memory traffic in bytes a row, and a prediction of the
share of the memory's bandwidth that is reached. A new Triton module appears by having VARIANTS, a new CUDA source by
lying beside the others. Kernels of yet another compiler appear by a function in SOURCES that gives their sections, with
their Resources as that compiler reports them.

It needs Triton and nvcc. Nothing is written if a kernel does not compile, spills, or needs more shared memory than there is.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import compile_kernels
import kernel_bounds
import ptxas_report
import triton
from kernel_resources import Resources

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"

INTRODUCTION = """# GPU kernels

One section for each file of kernels: what one program (a block of threads) owns, its memory traffic, and what its
compiled forms use. The tables were read from the machine code that the compilers make; no GPU is needed for that.
**Every share of a bandwidth and every time on this page is a prediction** where it is not called measured, made from the traffic
and the arithmetic. What an H200 took is in [performance](performance.md#on-a-gpu).

This page is generated: `python tools/make_kernels_page.py`. Tests compile all of it anew, for sm_90, the widest forms for gfx942,
and with `-m soak` all of them for all, and fail where a kernel does not compile, spills registers to local memory or needs more shared
memory than the GPU has.

A cell shows, as the largest among the variants, the registers of a thread, the bytes of shared memory of a block (from
sm_90 on with the 1024 that the system reserves) and the bytes of local memory of a thread, which is where registers are
spilled to. B: images, K: classes, M: context tokens, R: rows of an image, d: width, E: embedding.

## What a step launches

A layer is 8 launches forward and 9 backward; the tower launches 5 more forward and 5 or 6 backward. Beside the tower a training
step of several images is 12 launches, and 13 with loss scaling, from image features to the parameters of the next step; of a
single image one less. They are

- the features' length 1, the Meta-Net 1 each way;
- the classes' features 1 each way, the head 3 and 2;
- the report 1: hits, the copies of the gradients, the largest of them, and whether one is infinite or NaN;
- the optimizer 1, which unscales and skips by itself, and the loss scale's update 1.

It was 26 and 35 before, and 35 and 46 before gradients were copied together and backward began from the loss scale. Predicted
were, at some 2 µs a launch: of a replayed step 5 launches fewer for the report, 8 for Meta-Net and length, 1 for the
logit scale's exponential, 28 µs; beside the graph, where a launch costs its host some 8 µs, 8 fewer with loss scaling. Counted are
14 and 22 fewer, in the interpreter, with torch's operations on a CPU for its launches (`tests/training/test_launches.py`); the times
only a GPU can show. Under `amp` and with class ranks Meta-Net or report are torch's operations as before. All but the launches of
optimizer and loss scale are in the recorded graph: the learning rate changes, and a step may be refused, without recording anew.

## What the host does

Where no graph serves, the host launches each pass anew. What that takes of its processor, the launches themselves left out, in
milliseconds for 12 layers and one image, best of three runs of `python tools/measure_host_time.py` on one core of an Intel Xeon:

| | before | now |
| --- | ---: | ---: |
| a forward pass; forward and backward | 1.3; 3.4 | 1.3; 3.3 |
| a part of 32 of ImageNet's 1000 classes: to build; with its forward and backward | 2.2; 21.8 | 1.5; 9.0 |
| of 100 classes | 4.7; 25.8 | 2.1; 9.2 |
| of 500 classes | 18.4; 57.3 | 4.8; 15.0 |

A part is what a step that prunes goes backward through, another one each time, and what an image has in an evaluation by
shortlists. Before, its attention was planned row by row, and memory was looked at for each part; now by operations on
whole arrays, and a part fits where the whole tree does. Its plan goes to the GPU in one transfer. What is left is the first
pass of a new shape, whose memory is laid out and whose arguments are looked at.

Training steps, the batches of an evaluation and those of a `Predictor` are recorded as graphs. Evaluation by shortlists is not: each
image has a tree of its own classes, of other shapes than the image's before, and a graph would serve one image.

## What is proved how

| what | how, without a GPU | where |
| --- | --- | --- |
| what a kernel computes | Triton's interpreter, against twins in float64, between guard regions; the CUDA sources on an emulator | `tests/kernels`, `tests/cuda` |
| that it compiles, and what it uses | ahead of time for every target, by the binder and with the attributes of a launch; on AMD's GPUs for tensors below and above 2 GB | `tools/compile_kernels.py` |
| that other versions of Triton compile it, for other GPUs | each version installed beside the own one, see [triton_versions.md](triton_versions.md); by hand, not in CI | `tools/check_triton_versions.py` |
| that rows come in loads of 128 bits, that attention is on tensor cores, that nothing is in local memory | the machine code of a step's launches, disassembled | `tests/kernels/test_machine_code.py` |
| what bounds a kernel | its instructions and its bytes, counted of a step's launches: see below | `tools/kernel_bounds.py` |
| that a step launches nothing else | a step's launches, bound for a driver that is not there, are compared with what was compiled | `tests/kernels/launched_kernels.py` |
| a recording that fails, memory that runs out in it, a second GPU | a stub in the driver's place | `tests/training/test_cuda_graphs.py`, `tests/experiments/test_predict.py` |
| a driver older than the toolkit; a GPU that waits for images | a stub | `tests/cuda/test_extension.py`, `tests/training/test_trainer.py` |
| a text tower in half precision under float32 masters, loss scaling | the interpreter and torch on a CPU | `tests/engine/test_text_dtype.py` |
| that the first hour on a GPU runs | every section of the report in the interpreter | `tests/tools/test_gpu_report.py` |

Only a GPU can show: times and bandwidths; that the vendor's compiler and caches do what the machine code promises; races between
the threads of a block (`compute-sanitizer`); what a driver does when a recording fails; memory as its allocator has it;
the order of streams. `python tools/run_gpu_report.py` shows all of it in an hour. On an H200 the kernels' tests, those of tests/gpu and
`verify` passed; the sanitizer, memory, several GPUs and AMD's have not been seen. On gfx1100 attention compiles and spills:
it is right and slow there. Triton 3.6, which is not in the table of [versions](triton_versions.md), breaks off on `assemble_dense`
for gfx942; it serves dense prompts in the reference's form alone.

The package `ttsem` (Python 3.12, `python -m ttsem.sanitize pytest ...`) runs tests on Triton's compiled IR and names accesses out
of bounds and races between programs, which `compute-sanitizer` does not look for. It is no stage of CI, as it asks for another
Python with a torch of its own, gigabytes. By hand the 12 tests of what `move_rows` computes passed under it; tests whose
tensors span gigabytes (rows further apart than 32 bits count) do not end in minutes and are to be deselected. The other
kernels' tests were not run under it to the end.
"""


@dataclass(frozen=True)
class Section:
    """What the page says of one file of kernels.

    Args:
        title: its heading.
        text: a paragraph or more: tile, traffic, prediction.
        resources: of every variant for every target.
    """

    title: str
    text: str
    resources: Sequence[Resources]


def triton_sections(jobs: int) -> list[Section]:
    """One for each module of Triton kernels."""
    modules = compile_kernels.kernel_modules()
    found = compile_kernels.compile_all(modules, list(compile_kernels.TARGETS), jobs)
    sections = []
    for module in modules:
        short = module.rpartition(".")[2]
        text = inspect.getdoc(importlib.import_module(module)) or ""
        own = [one for one in found if one.module == short]
        sections.append(Section(f"{short} (Triton {triton.__version__})", text, own))
    return sections


def cuda_sections(jobs: int) -> list[Section]:
    """One for each CUDA source."""
    return [Section(*section) for section in ptxas_report.cuda_sections(jobs)]


# What makes the sections, given the number of processes that it may use. In the page's order.
SOURCES: tuple[Callable[[int], list[Section]], ...] = (triton_sections, cuda_sections)


def page(sections: Sequence[Section]) -> str:
    """The whole page."""
    parts = [INTRODUCTION, kernel_bounds.section(), _totals(sections)]
    parts += [f"## {one.title}\n\n{one.text.strip()}\n\n{_table(one.resources)}\n" for one in sections]
    return "\n".join(parts)


def _totals(sections: Sequence[Section]) -> str:
    """How many forms were compiled for each target."""
    count = Counter(one.target for section in sections for one in section.resources)
    targets = ", ".join(f"{number} for {target}" for target, number in count.items())
    return f"Compiled in all: {count.total()} combinations of kernel, variant, dtype and target: {targets}.\n"


def _table(resources: Sequence[Resources]) -> str:
    """A line for each kernel and dtype, a column for each target."""
    targets = list(dict.fromkeys(one.target for one in resources))
    lines = [["kernel", "dtype", "variants", *targets], ["---", "---", *["---:"] * (1 + len(targets))]]
    for kernel, dtype in dict.fromkeys((one.kernel, one.dtype) for one in resources):
        own = [one for one in resources if (one.kernel, one.dtype) == (kernel, dtype)]
        cells = [_largest([one for one in own if one.target == target]) for target in targets]
        lines.append([f"`{kernel}`", dtype, str(len({one.name for one in own})), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _largest(resources: Sequence[Resources]) -> str:
    """Registers / shared bytes / local bytes."""
    columns = zip(*((one.registers, one.shared_bytes, one.local_bytes) for one in resources), strict=True)
    return " / ".join(str(max(column)) for column in columns)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: the processors")
    options = parser.parse_args()
    sections = [section for source in SOURCES for section in source(options.jobs)]
    if compile_kernels.report_problems(one for section in sections for one in section.resources):
        return 1
    PAGE.write_text(page(sections), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
