"""The sections of run_gpu_report.py: each is a function that tells rows and notes, run in a process of its own.

python tools/gpu_report_sections.py NAME        # what run_gpu_report.py starts
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocoop_fast import TreeTextEncoder
from cocoop_fast.measure.problem import Problem, ProblemSpec, build_problem, imagenet_names
from cocoop_fast.ops.table import BACKENDS

ROOT = Path(__file__).parents[1]
INTERPRET = os.environ.get("GPU_REPORT_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS: tuple[str, ...] = ("fp32",) if INTERPRET else tuple(DTYPES)
HALF = "fp32" if INTERPRET else "fp16"
CLASSES = (3,) if INTERPRET else (100, 1000, 21_841)
FEW = CLASSES[:1] if INTERPRET else CLASSES[:2]
BATCHES = (2,) if INTERPRET else (1, 8, 32)
CALLS = 20  # of a kernel in a graph
FEWEST_REPEATS, REPEATS, MOST_SECONDS = 5, 30, 0.3


def tell(**row: Any) -> None:
    """A row of the section's table."""
    _write(row=row)


def note(text: str) -> None:
    """A paragraph of the section."""
    _write(note=text)


def _write(**record: Any) -> None:
    from run_gpu_report import append

    append(Path(os.environ["GPU_REPORT_RECORDS"]), {"section": sys.argv[1], **record})


def has_gpu() -> bool:
    return torch.cuda.is_available()


def problem_of(classes: int, batch: int) -> Problem:
    """Of ViT-B/16's text tower with random weights; interpreted, of a tiny one."""
    model = None
    if INTERPRET:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        torch.manual_seed(0)
        vision = CLIPVisionCfg(layers=1, width=16, head_width=16, patch_size=112, image_size=224)
        model = CLIP(32, vision, CLIPTextCfg(width=32, heads=2, layers=2), quick_gelu=True).eval()
        model.requires_grad_(False)
    return build_problem(ProblemSpec(imagenet_names(classes), batch), model)


def on_device(problem: Problem, precision: str) -> torch.nn.Module:
    return deepcopy(problem.clip_model).to(DEVICE, DTYPES[precision])


def backends(precision: str) -> Iterator[str]:
    """Those that serve here; of the others a line says why not."""
    for one in BACKENDS:
        if one.name == "cpu":
            continue
        reason = one.refusal(DEVICE, DTYPES[precision])
        if reason is None:
            yield one.name
        else:
            note(f"No `{one.name}` in {precision}: {reason}.")


def seconds(action: Callable[[], object]) -> float:
    """The median time of a run, on the device by events, after three that are not counted."""
    if INTERPRET:
        return wall_seconds(action)
    for _ in range(2):
        action()
    torch.cuda.synchronize()
    once = wall_seconds(lambda: (action(), torch.cuda.synchronize()))
    times = []
    for _ in range(max(FEWEST_REPEATS, min(REPEATS, int(MOST_SECONDS / once)))):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def wall_seconds(action: Callable[[], object]) -> float:
    """Of one run, by the host's clock."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def replay_of(action: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """Runs a call, or several one after another, as a CUDA graph, recorded as training records its steps.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    from cocoop_fast.engine.graphs import CudaGraphs

    if INTERPRET:
        return action

    def work() -> None:
        for _ in range(calls):
            action()

    action()
    return CudaGraphs(DEVICE)(work)[1]


def replayed_seconds(action: Callable[[], object], calls: int = 1) -> float:
    """Of a call in :func:`replay_of`: the host does not count."""
    return seconds(replay_of(action, calls)) / (1 if INTERPRET else calls)


def replayed_ms(action: Callable[[], object]) -> float | str:
    """Milliseconds of :func:`replayed_seconds`, or why there are none."""
    try:
        return 1e3 * replayed_seconds(action)
    except RuntimeError as error:
        return f"not recorded: {str(error).splitlines()[0]}"


def if_it_fits(action: Callable[[], None], what: str) -> None:
    """Where memory does not suffice a line says so, and the section goes on."""
    try:
        action()
    except torch.OutOfMemoryError as error:
        note(f"{what}: {str(error).splitlines()[0]}")
    if not INTERPRET:
        torch.cuda.empty_cache()


def copy_rate() -> float:
    """Bytes a second, read and written, of copying a gigabyte."""
    source = torch.empty(2**12 if INTERPRET else 2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


# -- what there is, and whether it is right ----------------------------------------------------------------------


def device() -> None:
    import platform

    import triton

    from cocoop_fast.ops.extensions import CUDA, driver_version

    run = partial(subprocess.run, capture_output=True, text=True)
    commit = run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]).stdout.strip() or "unknown"
    if INTERPRET:
        note("No GPU: the CPU, with Triton in its interpreter.")
    else:
        found = torch.cuda.get_device_properties(0)
        tell(
            device=found.name,
            multiprocessors=found.multi_processor_count,
            GiB=found.total_memory / 2**30,
            capability=f"{found.major}.{found.minor}",
            driver=str(driver_version()),
        )
    note(
        f"torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}, CUDA "
        f"{torch.version.cuda}, ROCm {torch.version.hip}; {CUDA.describe()}; commit {commit}."
    )
    note(f"A device-to-device copy moves {copy_rate() / 1e9:.4g} GB/s, bytes read and written.")


def run_pytest(*arguments: str) -> None:
    """A row of how the tests ended, and what there is to say of failures and skipped ones."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", *arguments, f"--junitxml={path}"]
        status = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
        if not path.exists():
            raise SystemExit(f"pytest ended with status {status} and no result")
        suite = next(ElementTree.parse(path).iter("testsuite"))
        count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        failed = count["failures"] + count["errors"]
        passed = count["tests"] - failed - count["skipped"]
        tell(tests=" ".join(arguments), passed=passed, failed=failed, skipped=count["skipped"])
        reasons: Counter[str] = Counter()
        for case in suite.iter("testcase"):
            for outcome in case:
                message = (outcome.get("message") or "").partition("\n")[0]
                if outcome.tag == "skipped":
                    reasons[message] += 1
                elif outcome.tag in ("failure", "error"):
                    note(f"- FAILED `{case.get('classname')}::{case.get('name')}`: {message}")
        for reason, number in reasons.items():
            note(f"- {number} skipped: {reason}")
    if failed:
        raise SystemExit(f"{failed} tests failed")


def tests() -> None:
    if INTERPRET:
        run_pytest("tests/kernels/test_move_rows.py")
    else:
        run_pytest("tests/gpu", "tests/kernels", "--deselect", "tests/kernels/test_compiled_kernels.py")


def faults() -> None:
    run_pytest("tests/training/test_cuda_graphs.py", *(["-k", "stream"] if INTERPRET else []))
    if not INTERPRET:
        run_pytest("tests/gpu/test_faults.py")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """cocoop-fast with these arguments."""
    return subprocess.run([sys.executable, "-m", "cocoop_fast", *arguments], capture_output=True, text=True)


def verify() -> None:
    sizes = [
        [
            "--k",
            "3",
            "--model",
            "demo",
            "--steps",
            "1",
            "--device",
            "cpu",
            "--backend",
            "torch",
            "--precision",
            "fp32",
        ]
    ]
    if not INTERPRET:
        sizes = [["--k", str(k), "--device", "cuda"] for k in FEW]
    wrong = 0
    for size in sizes:
        result = command("verify", *size)
        note(f"`verify {' '.join(size)}` ended with status {result.returncode}:")
        note("```\n" + (result.stdout + result.stderr).strip()[-6000:] + "\n```")
        wrong |= result.returncode
    if wrong:
        raise SystemExit("verify found a difference")


# -- times -------------------------------------------------------------------------------------------------------


def attention_calls(problem: Problem, backend: str, precision: str) -> dict[str, Any]:
    """Forward and backward of a middle layer, ready to be called, and what they write."""
    heads, tree, batch = problem.weights.heads, problem.tree, problem.spec.batch
    d, dtype = problem.weights.width, DTYPES[precision]
    torch.manual_seed(0)
    qkv = torch.randn(batch, tree.rows, 3 * d, device=DEVICE).to(dtype)
    grad_o, o = torch.randn(2, batch, tree.rows, d, device=DEVICE).to(dtype)
    sos_k, sos_v = torch.randn(2, d, device=DEVICE).to(dtype)
    inputs = (*qkv.split(d, -1), sos_k, sos_v, heads)
    (load,) = (one.load for one in BACKENDS if one.name == backend and one.load)
    attention = load().tree_attention(tree, None, DEVICE)
    grads = torch.empty_like(qkv).split(d, -1)
    workspace = torch.empty(attention.workspace_floats(batch, heads, d // heads), device=DEVICE)
    return {
        "forward": partial(attention.forward, inputs, o),
        "backward": partial(attention.backward, grad_o, inputs, *grads, workspace),
        "written": [o, *grads],
        "bytes": batch * tree.rows * d * o.element_size(),
    }


def attention() -> None:
    """A middle layer's, by backend and precision, one call after another in a CUDA graph. The share is that of a copy's rate, for
    the fewest bytes; those of small sizes come from the cache."""
    rate = copy_rate()
    for classes in FEW:
        for batch in BATCHES[:2]:
            problem = problem_of(classes, batch)
            for precision in PRECISIONS:
                first: list[Tensor] = []
                for backend in backends(precision):
                    if backend == "torch":
                        continue
                    calls = attention_calls(problem, backend, precision)
                    row: dict[str, Any] = {"K": classes, "B": batch, "precision": precision}
                    row["backend"] = backend
                    for way, parts in (("forward", 4), ("backward", 7)):
                        time_of = replayed_seconds(calls[way], CALLS)
                        row[f"{way}, µs"] = time_of * 1e6
                        row[f"{way}, share"] = parts * calls["bytes"] / time_of / rate
                    found = [one.clone() for one in calls["written"]]
                    for ours, theirs in zip(found, first or found, strict=True):
                        check_same(ours, theirs, precision)
                    first = first or found
                    tell(**row)
    for classes in FEW:
        problem = problem_of(classes, BATCHES[0])
        try:
            if_it_fits(partial(flex_attention, problem), f"K = {classes}, FlexAttention")
        except RuntimeError as error:  # not every version of it can be recorded
            note(f"K = {classes}, FlexAttention: {str(error).splitlines()[0]}")


def check_same(ours: Tensor, theirs: Tensor, precision: str) -> None:
    """Two backends computed the same, up to the precision's rounding."""
    difference = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    if not difference <= (1e-5 if precision == "fp32" else 1e-2):
        raise SystemExit(f"the backends differ by {difference:.1e} in {precision}: no times are reported")


def flex_attention(problem: Problem) -> None:
    """The same rows by torch's FlexAttention with the tree as its mask: a row reads the rows whose subtree it is in."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    from cocoop_fast.measure.shared_rows import tree_block_mask

    tree, batch, heads = problem.tree, problem.spec.batch, problem.weights.heads
    mask = tree_block_mask(tree, DEVICE)
    shape = (batch, heads, 1 + tree.rows, problem.weights.width // heads)
    q, k, v = torch.randn(3, *shape, device=DEVICE, dtype=DTYPES[HALF]).unbind()
    run = partial(flex if INTERPRET else torch.compile(flex), q, k, v, block_mask=mask)
    row: dict[str, Any] = {"K": len(problem.spec.classes), "B": batch, "precision": HALF}
    forward = replayed_seconds(run, CALLS)
    row |= {"backend": "FlexAttention", "forward, µs": 1e6 * forward, "backward, µs": ""}
    if not INTERPRET:  # torch has none on a CPU
        inputs = [one.requires_grad_() for one in (q, k, v)]
        o = run()
        both = replayed_seconds(lambda: torch.autograd.grad(run(), inputs, o.detach()), CALLS)
        row["backward, µs"] = 1e6 * (both - forward)
    tell(**row)


def tower() -> None:
    """The text tower: launched anew, and replayed from a CUDA graph. The memory is what a step allocates above the model."""
    for classes in CLASSES:
        for batch in BATCHES:
            problem = problem_of(classes, batch)
            for precision in PRECISIONS:
                for backend in backends(precision):
                    what = f"K = {classes}, B = {batch}, {precision}, {backend}"
                    if_it_fits(partial(_tower, problem, precision, backend), what)


def tower_calls(problem: Problem, precision: str, backend: str) -> tuple[Callable[[], None], ...]:
    """Forward alone, and a step."""
    encoder = TreeTextEncoder(on_device(problem, precision), problem.tree, backend=backend)
    shape = (problem.spec.batch, problem.tree.n_ctx, problem.weights.width)
    ctx = (0.02 * torch.randn(shape, device=DEVICE)).requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            encoder(ctx)

    def step() -> None:
        features = encoder(ctx)
        torch.autograd.grad(features, ctx, features.detach())

    return forward, step


def _tower(problem: Problem, precision: str, backend: str) -> None:
    forward, step = tower_calls(problem, precision, backend)
    step()
    row: dict[str, Any] = {"K": len(problem.spec.classes), "B": problem.spec.batch, "precision": precision}
    row |= {"backend": backend, "rows": problem.tree.rows * problem.spec.batch}
    if INTERPRET:
        return tell(**row, **{"forward, ms": 1e3 * seconds(forward), "step, ms": 1e3 * seconds(step)})
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    row["forward, ms"], row["step, ms"] = 1e3 * seconds(forward), 1e3 * seconds(step)
    row["memory, MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    row["replayed, ms"] = replayed_ms(step)
    tell(**row)


def baselines() -> None:
    """Other ways to compute the same and ours, from image features to the gradients of what is learned, in half precision."""
    from cocoop_fast.measure.contestants import BY_NAME, CONTESTANTS, tree_on

    ours = replace(BY_NAME["engine"], build=tree_on("triton"), why_not=lambda problem: None)
    contestants = [ours if one is BY_NAME["engine"] else one for one in CONTESTANTS]
    for compiled in (False, True):  # what takes minutes comes last
        for classes in FEW:
            problem = problem_on(problem_of(classes, 1))
            for one in (one for one in contestants if one.compiled == compiled):
                reason = "it is for a GPU" if INTERPRET and compiled else one.why_not(problem)
                if reason:
                    note(f"No {one.name}: {reason}.")
                else:
                    if_it_fits(partial(_baseline, one, problem), f"K = {classes}, {one.name}")


def _baseline(contestant: Any, problem: Problem) -> None:
    runner, factor = contestant.build(problem), contestant.seconds_per_batch(problem)
    row: dict[str, Any] = {"K": len(problem.spec.classes), "precision": HALF, "contestant": contestant.name}
    row |= {f"{way}, ms": 1e3 * factor * seconds(getattr(runner, way)) for way in ("forward", "step")}
    if not INTERPRET:
        replayed = "" if contestant.compiled else replayed_ms(runner.step)
        row["step replayed, ms"] = factor * replayed if isinstance(replayed, float) else replayed
    tell(**row)


def problem_on(problem: Problem) -> Problem:
    """On the device, in half precision."""
    model = on_device(problem, HALF)
    placed = build_problem(problem.spec, model)
    moved = {name: getattr(placed, name).to(DEVICE) for name in ("features", "labels", "tokens", "lengths")}
    moved["features"] = moved["features"].to(DTYPES[HALF])
    return replace(placed, **moved)


def trainer() -> None:
    """The whole of training, images and all; random weights learn nothing and take the same time."""
    size = ["--model", "demo", "--shots", "1", "--device", "cpu", "--backend", "torch"]
    if not INTERPRET:
        data = ["--dataset", "icons", "--shots", "4"] if find_spec("qtawesome") else ["--shots", "16"]
        size = ["--model", "ViT-B-16-quickgelu", "--pretrained", "random", *data]
    for batch in ("1",) if INTERPRET else ("1", "8"):
        with tempfile.TemporaryDirectory() as folder:
            output = ["--epochs", "1", "--batch-size", batch, "--output-dir", f"{folder}/run", "--quiet"]
            result = command("train", *size, *output)
            path = Path(folder, "run", "metrics.jsonl")
            if result.returncode or not path.exists():
                raise SystemExit(f"train ended with status {result.returncode}: {result.stderr[-500:]}")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
        tell(of=" ".join(size), B=batch, **{"images a second": rates[-1] if rates else "not told"})


def memory() -> None:
    """A step's peak above the loaded model, beside what was counted for it."""
    if INTERPRET:
        note("A CPU's memory is measured by `tools/check_plan.py`.")
    for classes in FEW:
        problem = problem_of(classes, BATCHES[-1])
        encoder = TreeTextEncoder(on_device(problem, HALF), problem.tree)
        counted = encoder.memory.step_bytes(encoder.tower, problem.spec.batch)
        row: dict[str, Any] = {"K": classes, "B": problem.spec.batch, "counted, MB": counted / 1e6}
        if not INTERPRET:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            ctx = torch.zeros(problem.spec.batch, problem.tree.n_ctx, problem.weights.width, device=DEVICE)
            encoder(ctx.requires_grad_()).sum().backward()
            row["measured, MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        tell(**row)


# -- why ---------------------------------------------------------------------------------------------------------


def profile() -> None:
    """Where the time of a replayed step goes, by torch.profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    kinds = [ProfilerActivity.CPU] if INTERPRET else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    order = "self_cpu_time_total" if INTERPRET else "self_device_time_total"
    for classes in FEW:
        replay = replay_of(tower_calls(problem_of(classes, BATCHES[0]), HALF, "triton")[1])
        replay()
        with profiler(activities=kinds) as found:
            for _ in range(REPEATS):
                replay()
            if not INTERPRET:
                torch.cuda.synchronize()
        events = [one for one in found.key_averages() if getattr(one, order)]
        for one in sorted(events, key=lambda one: -getattr(one, order))[:24]:
            times = {"calls a step": one.count / REPEATS, "µs a step": getattr(one, order) / REPEATS}
            tell(K=classes, kernel=one.key[:90], **times)
        note(f"In all {sum(getattr(one, order) for one in events) / REPEATS:.4g} µs a step at K = {classes}.")


def ncu() -> None:
    _by_tool("ncu", ["--target-processes", "all", "--set", "basic", "--launch-count", "40"], "attention")


def sanitizer() -> None:
    tools = ("memcheck", "racecheck", "initcheck")
    status = {
        one: _by_tool("compute-sanitizer", ["--tool", one, "--error-exitcode", "9"], "tests") for one in tools
    }
    if wrong := [one for one, status_of_it in status.items() if status_of_it]:
        raise SystemExit(f"{' and '.join(wrong)} found something, or a test failed")


def _by_tool(name: str, options: list[str], what: str) -> int:
    """Small kernels' tests, or one attention, under a tool of NVIDIA's; its exit status, 0 where it is not there."""
    tool = shutil.which(name)
    if tool is None or INTERPRET:
        note(f"`{name} {' '.join(options)}`: {'no GPU' if INTERPRET else 'not installed here'}.")
        return 0
    tested = [
        "tests/kernels/test_tree_attention.py",
        "-k",
        "test_trees" if what == "tests" else "test_shapes",
    ]
    run = [tool, *options, sys.executable, "-m", "pytest", "-q", "-x", *tested]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    note(f"`{' '.join(run[1:])}` ended with status {result.returncode}:")
    note("```\n" + result.stdout.strip()[-8000:] + "\n```")
    return result.returncode


def sweep() -> None:
    """Tree attention by the warps of a program, forward and backward."""
    from cocoop_fast.kernels import tree_attention

    for classes in FEW:
        problem = problem_of(classes, BATCHES[0])
        block = tree_attention._head_block(problem.weights.width, problem.weights.heads)[1]
        key = block * DTYPES[HALF].itemsize
        chosen = tree_attention.WARPS[key]
        for warps in (1,) if INTERPRET else (1, 2, 4, 8):
            tree_attention.WARPS[key] = (warps, warps, warps)
            calls = attention_calls(problem, "triton", HALF)
            times = {
                f"{way}, µs": 1e6 * replayed_seconds(calls[way], CALLS) for way in ("forward", "backward")
            }
            tell(K=classes, precision=HALF, warps=warps, **times)
        tree_attention.WARPS[key] = chosen
        note(f"Chosen at K = {classes}: {chosen[0]} forward, {chosen[1]} or {chosen[2]} backward.")


def plan() -> None:
    """The constants of plan, measured; and its prediction by them beside the measured step."""
    from cocoop_fast.measure.cost import GpuLayout, TreeCost
    from cocoop_fast.measure.devices import find_gpu
    from cocoop_fast.measure.predict import seconds_of_pass

    n = 64 if INTERPRET else 8192
    a, b = torch.randn(2, n, n, device=DEVICE).to(DTYPES[HALF])
    flops = 2 * n**3 / seconds(lambda: a @ b)
    rate = copy_rate()
    tell(**{"GEMM, TFLOP/s": flops / 1e12, "copy, GB/s": rate / 1e9})
    if INTERPRET:
        gpu = find_gpu("A100")
        note("No GPU: the A100's data sheet stands in for one.")
    else:
        try:
            gpu = find_gpu(torch.cuda.get_device_name())
        except ValueError as error:
            found = torch.cuda.get_device_properties(0)
            return note(f"{error} A record: {{name: {found.name}, memory_gb: {found.total_memory / 1e9:.0f}, bandwidth_gbs: {rate / 1e9:.0f}, units: {found.multi_processor_count}}}.")  # fmt: skip
    for classes in FEW:
        problem = problem_of(classes, BATCHES[0])
        cost = TreeCost(problem.weights.to(torch.device("meta"), DTYPES[HALF]), problem.tree, GpuLayout())
        predicted = seconds_of_pass(cost.step(BATCHES[0]), gpu.at(HALF))
        row: dict[str, Any] = {"K": classes, "B": BATCHES[0], "predicted step, ms": 1e3 * predicted}
        if not INTERPRET:
            _, step = tower_calls(problem, HALF, "triton")
            for _ in range(3):
                step()
            row["measured step, ms"] = replayed_ms(step)
        tell(**row)
    peak = gpu.tflops[HALF] * 1e12
    note(
        "The patch of cocoop_fast/measure/devices.py and assets/gpus.yaml that this machine asks for:\n\n```\n"
        f"GEMM_EFFICIENCY = {flops / peak:.2f}\nBANDWIDTH_EFFICIENCY = {rate / 1e9 / gpu.bandwidth_gbs:.2f}\n"
        f"# {gpu.name}: measured {HALF} {flops / 1e12:.4g} TFLOP/s, copy {rate / 1e9:.4g} GB/s\n```"
    )


@dataclass(frozen=True)
class Section:
    title: str
    run: Callable[[], None]
    limit: float  # seconds


# In the order of what is worth most if the hour is cut short.
SECTIONS = {
    "device": Section("The device", device, 120),
    "tests": Section("Tests", tests, 900),
    "faults": Section("Injected faults", faults, 300),
    "verify": Section("Equal to the reference", verify, 900),
    "attention": Section("Tree attention, one layer of ViT-B/16's text tower", attention, 300),
    "tower": Section("The text tower, forward and backward", tower, 900),
    "trainer": Section("The whole trainer", trainer, 600),
    "baselines": Section("Other ways to compute the same", baselines, 900),
    "memory": Section("Memory, from the loaded model on", memory, 300),
    "plan": Section("The plan and its constants", plan, 300),
    "profile": Section("Where the time of a step goes", profile, 300),
    "sweep": Section("Warps of tree attention", sweep, 300),
    "ncu": Section("Kernels under ncu", ncu, 600),
    "sanitizer": Section("Kernels under compute-sanitizer", sanitizer, 1200),
}


if __name__ == "__main__":
    SECTIONS[sys.argv[1]].run()
