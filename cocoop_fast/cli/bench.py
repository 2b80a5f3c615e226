"""``cocoop-fast bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cocoop_fast.cli import output
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.measure.compare import Comparison, Result

EPILOG = """
[bold]Examples[/bold]

100 ImageNet names, a text tower of ViT-B/16's size: [cyan]cocoop-fast bench[/cyan]

Your classes and model, with a picture: [cyan]cocoop-fast bench --classes names.txt --model ViT-B-32-quickgelu --pretrained openai --plot bench.png[/cyan]

The engine against its matrix multiplications: [cyan]cocoop-fast bench --k 1000 --only engine --only floor[/cyan]
"""

SHOWN = "What is shown"
TOO_BUSY = 0.05  # share of the processors that other programs may use before times mean little


def command(
    classes: Annotated[
        Path | None, typer.Option(help="Class names, one a line. Default: ImageNet's.", show_default=False)
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Only the first so many classes. Default: 100 of ImageNet's.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="open_clip architecture, or demo. Default: ViT-B/16's text tower with random weights.",
            show_default=False,
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help="open_clip tag of the weights, a local file, or random.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images a step.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often each contestant is measured.")] = 5,
    max_seconds: Annotated[
        float, typer.Option(help="Time for each contestant; one that needs more for two runs is left out.")
    ] = 60.0,
    only: Annotated[
        list[str] | None, typer.Option(help="Measure this contestant; may be repeated.", show_default=False)
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave this contestant out; may be repeated.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch and the engine. Default: torch's choice.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure peak memory too, each in a process of its own.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a picture (png, svg, pdf).", show_default=False, rich_help_panel=SHOWN),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one line of JSON on stdout, and nothing else.", rich_help_panel=SHOWN
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress; only the result.", rich_help_panel=SHOWN),
    ] = False,
) -> None:
    """Time a CoCoOp training step on this machine, against what others would write.

    Every contestant's logits and gradients are first compared with the dense oracle's. All are then measured in
    turn, and the best time of each counts.
    """
    check_positive(k=k, batch_size=batch_size, rounds=rounds, threads=threads, max_seconds=max_seconds)
    _check_writable(plot)
    names = class_names(classes, k)
    if pretrained is not None and model is None:
        raise UserError("--pretrained needs the --model that it belongs to.")

    import torch

    from cocoop_fast.measure.compare import compare
    from cocoop_fast.measure.contestants import choose
    from cocoop_fast.measure.plot import plot_comparison
    from cocoop_fast.measure.problem import ProblemSpec, build_problem

    contestants = choose(only, skip)
    previous = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with output.only_json(json):
            problem = build_problem(
                ProblemSpec(classes=names, batch=batch_size, model=model, pretrained=pretrained)
            )
            comparison = compare(
                problem,
                contestants,
                rounds=rounds,
                max_seconds=max_seconds,
                memory=memory,
                tell=(lambda line: None) if quiet or json else _tell,
            )
            if not comparison.results:
                reasons = "; ".join(f"{name} {reason}" for name, reason in comparison.notes.items())
                raise UserError(f"No contestant could be measured: {reasons}.", exit_status=1)
            mapping = comparison.to_mapping()
            if plot is not None:
                plot_comparison(mapping, plot)
    finally:
        torch.set_num_threads(previous)
    if json:
        output.print_json({"command": "bench", **mapping})
    else:
        _print(comparison)
        if plot is not None:
            print(f"Plot: {plot}")


def check_positive(**limits: float | None) -> None:
    for name, value in limits.items():
        if value is not None and (value < 1 if name != "max_seconds" else not value > 0):
            raise UserError(f"--{name.replace('_', '-')} is {value}, but it must be positive.")


def _check_writable(plot: Path | None) -> None:
    """Before minutes are spent on what the plot would show."""
    if plot is None:
        return
    if plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot is {plot}, but its name must end in .png, .svg or .pdf.")
    if not plot.parent.is_dir():
        raise UserError(f"--plot is {plot}, but there is no directory {plot.parent}.")


def class_names(path: Path | None, k: int | None) -> tuple[str, ...]:
    from cocoop_fast.measure.problem import imagenet_names, read_class_names

    if path is None:
        return imagenet_names(100 if k is None else k)
    try:
        names = read_class_names(path.read_text(encoding="utf-8").splitlines(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"The class list {path} is not text in UTF-8.", exit_status=1) from error
    if k is not None and k > len(names):
        raise UserError(f"--k is {k}, but {path} holds {len(names)} class names.")
    return names[:k]


def _tell(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def _print(comparison: Comparison) -> None:
    from cocoop_fast.measure.machine import describe_machine, one_line

    spec = comparison.problem.spec
    columns = ["Contestant", "Rows", "Step", "Median", "× floor", "Speed-up", "Forward"]
    rows = [_row(comparison, name, result) for name, result in comparison.results.items()]
    if any(result.peak_bytes is not None for result in comparison.results.values()):
        columns.append("Memory")
        for row, result in zip(rows, comparison.results.values(), strict=True):
            row.append(output.NOTHING if result.peak_bytes is None else _megabytes(result.peak_bytes))
    images = "1 image" if spec.batch == 1 else f"{spec.batch} images"
    print(f"{spec.model_name}: {len(spec.classes)} classes, {images} a step.")
    output.print_table(columns, rows)
    for name, result in comparison.results.items():
        print(f"{name}: {result.contestant.title}.")
    print(
        "Step: forward and backward, the best of all rounds, and the median. Speed-up: over the dense oracle."
    )
    if comparison.others is not None and comparison.others > TOO_BUSY:
        print(f"Other programs used {comparison.others:.0%} of the processors: measure again without them.")
    for name, reason in comparison.notes.items():
        print(f"Left out: {name} ({reason}).")
    print(one_line(describe_machine()))


def _row(comparison: Comparison, name: str, result: Result) -> list[str]:
    from cocoop_fast.readable import readable_seconds

    return [
        name,
        f"{result.work.rows:,}",
        readable_seconds(result.step.best),
        readable_seconds(result.step.median),
        _number(comparison.ratio_to_floor(name), "{:.2f}"),
        _number(comparison.speedup(name), "{:.1f}"),
        output.NOTHING if result.forward is None else readable_seconds(result.forward.best),
    ]


def _number(value: float | None, form: str) -> str:
    return output.NOTHING if value is None else form.format(value)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
