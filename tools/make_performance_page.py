"""The figures of docs/performance.md.

    python tools/make_performance_page.py --measure   # run everything (a quarter of an hour), then fill the page
    python tools/make_performance_page.py             # fill the page from benchmarks/results/

The page's text is written by hand. Between `<!-- begin NAME -->` and `<!-- end -->` stands what this script makes of
the results, with the command that measured it above each table.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cocoop_fast.measure.contestants import CONTESTANTS, linear_flops
from cocoop_fast.measure.cost import TreeCost, layout_on
from cocoop_fast.measure.machine import one_line
from cocoop_fast.measure.plot import plot_comparison, plot_growth
from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names, random_text_tower
from cocoop_fast.readable import readable_images, readable_seconds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

TREE = "--only engine --only floor"
COMMANDS = {  # result: what prints it as JSON
    "step-k20": f"cocoop-fast bench --k 20 --rounds 25 {TREE} --memory --json",
    "step-k100": "cocoop-fast bench --k 100 --rounds 9 --max-seconds 100 --memory --json",
    "step-k1000": "cocoop-fast bench --k 1000 --rounds 4 --max-seconds 60 --only padding-free --only tree+torch"
    " --only engine --only floor --memory --json",
    "batch-k100": f"cocoop-fast bench --k 100 --batch-size 8 --rounds 7 {TREE} --json",
    "profile-k20": "python tools/profile_step.py --k 20 --steps 20 --json",
    "profile-k100": "python tools/profile_step.py --k 100 --steps 10 --json",
    "profile-k1000": "python tools/profile_step.py --k 1000 --steps 3 --json",
    "gemms": "python tools/compare_gemms.py --out benchmarks/results/gemms.json",
    "limits": "python tools/measure_limits.py --out benchmarks/results/limits.json",
}
PLOTS = {"step-k100": "step_k100.png", "step-k1000": "step_k1000.png"}


def measure(names: list[str]) -> None:
    """Run the commands, one after another, and keep what they print."""
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        print(f"{name}: {COMMANDS[name]}", flush=True)
        program, *arguments = COMMANDS[name].split()
        start = [sys.executable, "-m", "cocoop_fast"] if program == "cocoop-fast" else [sys.executable]
        done = subprocess.run([*start, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        if "--out" not in arguments:
            found = json.loads(done.stdout.splitlines()[-1])
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def with_command(name: str, table: str) -> str:
    return f"```bash\n{COMMANDS[name]}\n```\n\n{table}"


def comparison(name: str) -> str:
    """Everyone's step and forward pass."""
    found = read(name)
    header = [
        "",
        "rows",
        "step",
        "median",
        "20 to 80 %",
        "× floor",
        "of peak",
        "speed-up",
        "forward",
        "× floor",
        "memory",
    ]
    rows = []
    for row in found["contestants"]:
        step, forward = row["step"], row["forward"]
        rows.append(
            [
                f"{row['name']}: {row['title']}",
                f"{row['rows']:,}",
                readable_seconds(step["best"]),
                readable_seconds(step["median"]),
                f"{step['p20']:.3g} to {step['p80']:.3g} s",
                _number(row["step_to_floor"], "{:.2f}"),
                _number(row.get("step_of_peak"), "{:.0%}"),  # files made before it was measured are without
                _number(row["step_speedup"], "{:.1f}"),
                "" if forward is None else readable_seconds(forward["best"]),
                _number(row["forward_to_floor"], "{:.2f}"),
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB",
            ]
        )
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    table = markdown([header[i] for i in used], [[row[i] for i in used] for row in rows])
    left_out = "".join(f"\nLeft out: {name}, {reason}.\n" for name, reason in found["left_out"].items())
    others = found["used_by_other_programs"]
    if others is not None and others > 0.03:
        left_out += f"\nOther programs used {others:.0%} of the processors during this measurement.\n"
    return with_command(name, table) + ("\n" + left_out.rstrip() if left_out else "")


def accounting() -> str:
    """From FLOPs to seconds, for one image."""
    tower = random_text_tower()
    header = ["one image", "K = 20", "K = 100", "K = 1000"]
    columns = []
    for k in (20, 100, 1000):
        problem = build_problem(ProblemSpec(imagenet_names(k)), tower)
        times = {row["name"]: row["step"]["best"] for row in read(f"step-k{k}")["contestants"]}
        profile = read(f"profile-k{k}")
        rows = problem.tree.rows
        floor_flops = 2 * linear_flops(problem.weights, rows)
        step = TreeCost(problem.weights, problem.tree, layout_on("cpu")).step(1)
        flops = step.gemm_flops
        share = _by_kind(profile["ops"])
        columns.append(
            [
                f"{rows:,}",
                f"{floor_flops / 1e9:.1f} GFLOP",
                f"{flops / 1e9:.1f} GFLOP ({flops / floor_flops - 1:+.1%})".replace("-", "−"),
                f"{step.saved_bytes / 1e6:,.0f} MB",
                f"{readable_seconds(times['floor'])} ({floor_flops / times['floor'] / 1e9:.0f} GFLOP/s)",
                readable_seconds(times["floor"] * flops / floor_flops),
                f"{readable_seconds(times['engine'])} ({times['engine'] / times['floor']:.2f} × floor)",
                *(f"{share[kind]:.1%}" for kind in KINDS),
            ]
        )
    names = [
        "rows R = M + N",
        "floor: GEMMs of all rows",
        "GEMMs that the engine needs",
        "activations kept for backward",
        "floor, measured",
        "the engine's GEMMs at the floor's speed",
        "engine, measured",
        *(f"of a profiled step: {kind}" for kind in KINDS),
    ]
    table = markdown(header, [[name, *(column[i] for column in columns)] for i, name in enumerate(names)])
    commands = "\n".join(COMMANDS[f"profile-k{k}"] for k in (20, 100, 1000))
    return f"```bash\n{commands}\n```\n\n{table}"


KINDS = ("GEMMs", "attention", "LayerNorm", "activation", "other kernels and copies", "unaccounted")


def _by_kind(ops: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the step by kind of operation."""
    shares = dict.fromkeys(KINDS, 0.0)
    for row in ops:
        name = row["op"]
        if row["gflops"] is not None:
            kind = "GEMMs"
        elif "ttention" in name:
            kind = "attention"
        elif "layer_norm" in name:
            kind = "LayerNorm"
        elif "activation" in name:
            kind = "activation"
        else:
            kind = "unaccounted" if name == "unaccounted" else "other kernels and copies"
        shares[kind] += row["share"]
    return shares


def profile(name: str) -> str:
    """The longest operations of a step."""
    found = read(name)
    rows = [
        [
            row["op"],
            _number(row["calls"], "{:g}"),
            f"{row['ms']:.2f}",
            f"{row['share']:.1%}",
            _number(row["gflops"], "{:.0f}"),
            _number(row["gbytes"], "{:.1f}"),
        ]
        for row in found["ops"]
        if row["share"] >= 0.004 or row["op"] == "unaccounted"
    ]
    return with_command(name, markdown(["op", "calls", "ms", "share", "GFLOP/s", "GB/s"], rows))


def products() -> str:
    """Ways to multiply, each as a share of torch.mm's time."""
    found = read("gemms")["products"]
    variants = list(dict.fromkeys(row["variant"] for row in found))
    rows = []
    for count in dict.fromkeys(row["rows"] for row in found):
        for direction in ("forward", "backward"):
            mine = [row for row in found if (row["rows"], row["direction"]) == (count, direction)]
            sums = {v: sum(r["seconds"] for r in mine if r["variant"] == v) for v in variants}
            flops = sum(r["gflops"] * r["seconds"] for r in mine if r["variant"] == "mm")
            cells = [f"{sums[v] / sums['mm']:.2f}" for v in variants if v != "mm"]
            rows.append([f"{count:,} rows, {direction}", f"{flops / sums['mm']:.0f}", *cells])
    header = ["a layer's four products", "torch.mm, GFLOP/s", *(f"{v}, time" for v in variants if v != "mm")]
    return with_command("gemms", markdown(header, rows))


def schedules() -> str:
    """Whole layers or panels."""
    found = read("gemms")["schedules"]
    names = list(dict.fromkeys(row["schedule"] for row in found))
    rows = []
    for count in dict.fromkeys(row["rows"] for row in found):
        same = {row["schedule"]: row for row in found if row["rows"] == count}
        cells = [f"{readable_seconds(same[n]['seconds'])} ({same[n]['gflops']:.0f})" for n in names]
        rows.append([f"{count:,}", *cells])
    return markdown(["rows", *(f"{name}, seconds (GFLOP/s)" for name in names)], rows)


def streaming() -> str:
    """1000 classes with and without a memory budget."""
    found = read("limits")["streaming"]
    rows = [
        [
            one["budget"] or "no budget",
            str(one["shards"] or 1),
            readable_seconds(one["seconds"]),
            f"{one['seconds'] / found['whole']['seconds']:.2f}",
            f"{one['peak_bytes'] / 1e6:,.0f} MB",
        ]
        for one in (found["whole"], found["streamed"])
    ]
    table = markdown(["1000 classes", "pieces", "step", "× without budget", "memory"], rows)
    error = f"Largest difference of the two gradients: {found['relative_gradient_error']:.1e} of their largest element."
    return with_command("limits", f"{table}\n\n{error}")


def growth() -> str:
    """Up to ImageNet-22k within one budget."""
    found = read("limits")["growth"]
    header = ["classes", "rows", "pieces", "step", "ms a row", "memory"]
    rows = [
        [
            f"{one['classes']:,}",
            f"{one['rows']:,}",
            str(one["shards"] or 1),
            readable_seconds(one["seconds"]),
            f"{1e3 * one['seconds'] / one['rows']:.2f}",
            f"{one['peak_bytes'] / 1e6:,.0f} MB",
        ]
        for one in found
    ]
    return markdown(header, rows)


def pruning() -> str:
    """The exact step and the pruned one."""
    one = read("limits")["pruning"]
    header = ["1000 classes", "step", "classes in backward", "weights left out", "error of the gradient"]
    rows = [
        ["exact", readable_seconds(one["exact_seconds"]), f"{one['classes']:,}", "0", "0"],
        [
            f"`prune_mass` {one['tau']}",
            f"{readable_seconds(one['pruned_seconds'])} ({one['pruned_seconds'] / one['exact_seconds']:.2f} ×)",
            f"{one['classes_kept']:.0f}",
            f"{one['share_left_out']:.2%}",
            f"{one['relative_gradient_error']:.1e}",
        ],
    ]
    said = (
        f"The likeliest class has {one['top_probability']:.2f} of the probability, and {one['classes_of_rest']} others have "
        "99 % of the rest. The error is that of the contexts' gradient, in the Euclidean norm, relative."
    )
    return f"{markdown(header, rows)}\n\n{said}"


def gpu_rows(section: str) -> list[dict[str, Any]]:
    """Of the reports of `tools/run_gpu_report.py` that were kept, which run too."""
    found = map(json.loads, (RESULTS / "gpu-h200.jsonl").read_text().splitlines())
    return [{"run": one["run"], **one["row"]} for one in found if one["section"] == section and "row" in one]


def _of_runs(values: list[Any], form: str = "{:.3g}") -> str:
    """The numbers of all runs."""
    return ", ".join(dict.fromkeys(form.format(one) for one in values if isinstance(one, float)))


def gpu_contestants() -> str:
    """A step from image features to the gradients of what is learned: launched by the host, and replayed."""
    found = gpu_rows("baselines")
    titles = {one.name: one.title for one in CONTESTANTS} | {"engine": "class tree, the engine in Triton"}
    columns = [(k, way) for k in (100, 1000) for way in ("step, ms", "step replayed, ms")]
    values = {
        (one, *column): [r[column[1]] for r in found if (r["contestant"], r["K"]) == (one, column[0])]
        for one in titles
        for column in columns
    }
    header = [
        "ms a step, fp16",
        "100 classes, launched",
        "replayed",
        "× engine",
        "1000, launched",
        "replayed",
        "× engine",
    ]
    rows = []
    for one in titles:
        if any(values[(one, *column)] for column in columns):
            cells = [f"{one}: {titles[one]}"]
            for k in (100, 1000):
                mine, ours = (
                    [v for v in values[name, k, "step replayed, ms"] if isinstance(v, float)]
                    for name in (one, "engine")
                )
                cells += [_of_runs(values[one, k, "step, ms"]), _of_runs(mine)]
                cells.append(f"{mine[0] / ours[0]:.2g}" if mine else "")
            rows.append(cells)
    return markdown(header, rows)


def gpu_tower() -> str:
    """The text tower alone by backend."""
    found = [row for row in gpu_rows("tower") if row["backend"] in ("triton", "cuda")]
    keys = list(dict.fromkeys((r["K"], r["B"], r["precision"], r["backend"]) for r in found))
    rows = []
    for key in sorted(
        keys, key=lambda one: (one[1], ("fp16", "bf16", "fp32").index(one[2]), one[3] == "cuda")
    ):
        mine = [r for r in found if (r["K"], r["B"], r["precision"], r["backend"]) == key]
        cells = [_of_runs([r[name] for r in mine]) for name in ("step, ms", "replayed, ms", "memory, MB")]
        rows.append([f"{key[0]} classes, {readable_images(key[1])}, {key[2]}, `{key[3]}`", *cells])
    return markdown(["text tower, forward and backward", "launched, ms", "replayed, ms", "memory, MB"], rows)


def gpu_attention() -> str:
    """One layer's attention, the host left out."""
    found = gpu_rows("attention")
    header = [
        "one layer",
        *(f"`{b}` {way}, µs" for b in ("triton", "cuda") for way in ("forward", "backward")),
    ]
    rows = []
    for key in dict.fromkeys((r["K"], r["B"], r["precision"]) for r in found):
        if key[2] == "bf16":  # as fp16
            continue
        cells = []
        for backend in ("triton", "cuda"):
            [one] = [r for r in found if (r["K"], r["B"], r["precision"], r["backend"]) == (*key, backend)]
            cells += [f"{one[f'{w}, µs']:.3g} ({one[f'{w}, share']:.0%})" for w in ("forward", "backward")]
        rows.append([f"{key[0]:,} classes, {readable_images(key[1])}, {key[2]}", *cells])
    return markdown(header, rows)


def described_machine() -> str:
    machine = read("step-k100")["machine"]
    return f"{one_line(machine)}, {machine['memory_gb']} GB, {machine['system']}; commit {machine['commit']}."


BLOCKS: dict[str, Callable[[], str]] = {
    "machine": described_machine,
    **{name: lambda name=name: comparison(name) for name in COMMANDS if name.startswith(("step", "batch"))},  # type: ignore[misc]
    "accounting": accounting,
    "profile-k100": lambda: profile("profile-k100"),
    "products": products,
    "schedules": schedules,
    "streaming": streaming,
    "growth": growth,
    "pruning": pruning,
    "gpu-contestants": gpu_contestants,
    "gpu-tower": gpu_tower,
    "gpu-attention": gpu_attention,
}


def fill(text: str) -> str:
    """The page with all its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- begin {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- begin ([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--measure", nargs="*", metavar="RESULT", help="measure these first; without names, all"
    )
    options = parser.parse_args()
    if options.measure is not None:
        unknown = set(options.measure) - set(COMMANDS)
        if unknown:
            parser.error(
                f"there is no result {', '.join(sorted(unknown))}; choose from {', '.join(COMMANDS)}"
            )
        measure(options.measure or list(COMMANDS))
    IMAGES.mkdir(exist_ok=True)
    for name, picture in PLOTS.items():
        plot_comparison(read(name), IMAGES / picture)
    plot_growth(read("limits")["growth"], IMAGES / "growth.png")
    PAGE.write_text(fill(PAGE.read_text()))


if __name__ == "__main__":
    main()
