"""Run every GPU test and measure the GPU backends, and write a report: for a machine with a GPU.

    python tools/run_gpu_report.py                       # gpu_report.md in the current directory, some minutes
    python tools/run_gpu_report.py --output h200.md --skip-tests

The report names the device, says how each group of tests ended and why tests were skipped, and has what was measured:
the bandwidth of a copy, the share of it that tree attention reaches, and the time and memory of the text tower forward
and backward in each precision. Results are compared with torch's own before they are timed.
Exit status 1 if a test failed (the report is written all the same), 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from cocoop_fast import TreeTextEncoder
from cocoop_fast.measure.problem import Problem, ProblemSpec, build_problem, imagenet_names
from cocoop_fast.ops.extensions import CUDA
from cocoop_fast.ops.table import BACKENDS, Backend

ROOT = Path(__file__).parents[1]
TESTS = ("tests/gpu", "tests/kernels")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLASSES, BATCHES = (100, 1000), (1, 8)
REPEATS = 30

Table = list[list[str]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_report.md"), help="where the report goes")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("run_gpu_report: torch finds no GPU with a working driver here", file=sys.stderr)
        return 2
    parts = ["# GPU report", describe_device()]
    failed = False
    if not options.skip_tests:
        table, failed, skipped = run_tests()
        parts += ["## Tests", markdown(table), *skipped]
    rate = copy_rate()
    parts += [
        "## Bandwidth",
        f"A device-to-device copy moves {rate / 1e9:.0f} GB/s, bytes read and written.",
        "## Tree attention, one layer of ViT-B/16's text tower",
        "The share is that of the copy's rate, for the fewest bytes that the operation must move.",
        markdown(measure_attention(rate)),
        "## The text tower, forward and backward",
        "Plain launches, no CUDA graph; the memory is what a step allocates above the model.",
        markdown(measure_tower()),
    ]
    options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{options.output} is written", file=sys.stderr)
    return int(failed)


def describe_device() -> str:
    """The device, its software, and the commit."""
    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    lines = [
        f"- device: {properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB",
        f"- torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}, "
        f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}",
        f"- {CUDA.describe()}",
        f"- commit {commit.stdout.strip() or 'unknown'}, {datetime.date.today().isoformat()}",
    ]
    return "\n".join(lines)


def run_tests() -> tuple[Table, bool, list[str]]:
    """How each folder of tests ended; whether one failed; why tests were skipped, and the failures' last words."""
    table, failed, details = [["tests", "passed", "failed", "skipped", "seconds"]], False, []
    with tempfile.TemporaryDirectory() as folder:
        for number, tests in enumerate(TESTS):
            path = Path(folder, f"{number}.xml")
            command = [sys.executable, "-m", "pytest", "-q", tests, f"--junitxml={path}"]
            status = subprocess.run(command, cwd=ROOT).returncode
            failed |= status != 0
            if not path.exists():
                details.append(f"`{tests}`: pytest ended with status {status} and no result")
                continue
            row, found = read_results(path, tests)
            table.append(row)
            details += found
    return table, failed, details


def read_results(path: Path, tests: str) -> tuple[list[str], list[str]]:
    """A row of the table from pytest's XML, and what there is to say of failures and skipped tests."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failures = count["failures"] + count["errors"]
    passed = count["tests"] - failures - count["skipped"]
    row = [tests, str(passed), str(failures), str(count["skipped"]), f"{float(suite.get('time', 0)):.0f}"]
    reasons: Counter[str] = Counter()
    details = []
    for case in suite.iter("testcase"):
        for outcome in case:
            message = (outcome.get("message") or "").partition("\n")[0]
            if outcome.tag == "skipped":
                reasons[message] += 1
            elif outcome.tag in ("failure", "error"):
                details.append(f"- FAILED `{case.get('classname')}::{case.get('name')}`: {message}")
    return row, [*details, *(f"- {number} skipped: {reason}" for reason, number in reasons.items())]


def seconds(action: Callable[[], object]) -> float:
    """The median time of a run on the device, by events, after three that are not counted."""
    for _ in range(3):
        action()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second, read and written, of copying a gigabyte."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def problems() -> Iterator[Problem]:
    for classes in CLASSES:
        for batch in BATCHES:
            yield build_problem(ProblemSpec(imagenet_names(classes), batch))


GPU_BACKENDS = [one for one in BACKENDS if one.name in ("triton", "cuda")]


def usable(backend: Backend, dtype: torch.dtype) -> bool:
    return backend.refusal(torch.device("cuda"), dtype) is None


def measure_attention(rate: float, heads: int = 8, head_size: int = 64) -> Table:
    """Forward and backward of a middle layer, by backend and precision."""
    table = [["K", "B", "precision", "backend", "forward, µs", "share", "backward, µs", "share"]]
    for problem in problems():
        tree, batch, d = problem.tree, problem.spec.batch, heads * head_size
        for precision, dtype in PRECISIONS.items():
            qkv = torch.randn(batch, tree.rows, 3 * d, device="cuda").to(dtype)
            grad_o, o = torch.randn(2, batch, tree.rows, d, device="cuda").to(dtype)
            sos_k, sos_v = torch.randn(2, d, device="cuda").to(dtype)
            inputs = (*qkv.split(d, -1), sos_k, sos_v, heads)
            results: dict[str, list[Tensor]] = {}
            for backend in GPU_BACKENDS:
                if not usable(backend, dtype):
                    continue
                attention = backend.load().tree_attention(tree, None, torch.device("cuda"))
                grads = torch.empty_like(qkv).split(d, -1)
                floats = attention.workspace_floats(batch, heads, head_size)
                workspace = torch.empty(floats, device="cuda")
                forward = bind(attention.forward, inputs, o)
                backward = bind(attention.backward, grad_o, inputs, *grads, workspace)
                times = [seconds(forward), seconds(backward)]
                results[backend.name] = [o.clone(), *(grad.clone() for grad in grads)]
                row_bytes = batch * tree.rows * d * o.element_size()
                shares = [parts * row_bytes / time / rate for parts, time in zip((4, 7), times, strict=True)]
                row = [str(len(problem.spec.classes)), str(batch), precision, backend.name]
                for time, share in zip(times, shares, strict=True):
                    row += [f"{time * 1e6:.1f}", f"{share:.0%}"]
                table.append(row)
            check_same(results, precision)
    return table


def bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def check_same(results: dict[str, list[Tensor]], precision: str) -> None:
    """Both backends computed the same, up to the precision's rounding."""
    if len(results) < 2:
        return
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    for ours, theirs in zip(*results.values(), strict=True):
        difference = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        if not difference <= tolerance:
            raise SystemExit(f"the backends differ by {difference:.1e} in {precision}: no times are reported")


def measure_tower() -> Table:
    """A step of the text tower by backend and precision."""
    table = [["K", "B", "precision", "backend", "step, ms", "memory, MB"]]
    for problem in problems():
        for precision, dtype in PRECISIONS.items():
            model = deepcopy(problem.clip_model).to("cuda", dtype)
            width = problem.weights.width
            ctx = torch.randn(problem.spec.batch, problem.tree.n_ctx, width, device="cuda").to(dtype)
            ctx = (0.02 * ctx).requires_grad_()
            for backend in BACKENDS:
                if not usable(backend, dtype):
                    continue
                encoder = TreeTextEncoder(model, problem.tree, backend=backend.name)

                def step(encoder: TreeTextEncoder = encoder, ctx: Tensor = ctx) -> None:
                    features = encoder(ctx)
                    ctx.grad = None
                    features.backward(features.detach())

                step()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                time = seconds(step)
                memory = torch.cuda.max_memory_allocated() - before
                row = [str(len(problem.spec.classes)), str(problem.spec.batch), precision, backend.name]
                table.append([*row, f"{time * 1e3:.3f}", f"{memory / 1e6:.0f}"])
    return table


def markdown(table: Table) -> str:
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
