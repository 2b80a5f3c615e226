"""``cocoop-fast eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from cocoop_fast.cli import output
from cocoop_fast.config import Subset
from cocoop_fast.errors import UserError

EPILOG = """
[bold]Examples[/bold]

What the run was evaluated on: [cyan]cocoop-fast eval output/digits/cocoop/seed1[/cyan]

All classes together: [cyan]cocoop-fast eval output/digits/cocoop/seed1 --subset all --json[/cyan]
"""


def command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="What `cocoop-fast train` wrote.")],
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="base|new|all",
            help="Classes to evaluate on; default: as the run was.",
            show_default=False,
        ),
    ] = None,
    reference_checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Learned parameters of the reference (model.pth.tar-N or its folder) in place of the run's own.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")] = False,
) -> None:
    """Evaluate a finished run again, on the same or on other classes."""
    if subset is not None and subset not in get_args(Subset):
        raise UserError(f"--subset is {subset!r}, but it must be one of {', '.join(get_args(Subset))}.")

    from cocoop_fast.cli.progress import observe
    from cocoop_fast.distributed.launch import join
    from cocoop_fast.evaluation.metrics import harmonic_mean
    from cocoop_fast.experiments import experiment

    with output.only_json(json), join() as ranks, observe(quiet=quiet or not ranks.is_first) as observer:
        results = experiment.evaluate_run(
            run_dir,
            subset=cast("Subset | None", subset),
            reference_checkpoint=reference_checkpoint,
            observer=observer,
            ranks=ranks,
        )
    if not ranks.is_first:
        return
    h = (
        harmonic_mean(results["base"].accuracy, results["new"].accuracy)
        if {"base", "new"} <= set(results)
        else None
    )
    if json:
        # The confusion matrix has K x K numbers; it is in the run directory, not in a line to read.
        kept = ("total", "correct", "accuracy", "error", "macro_f1")
        output.print_json(
            {
                "command": "eval",
                "run_dir": str(run_dir),
                "results": {
                    name: {key: getattr(metrics, key) for key in kept} for name, metrics in results.items()
                },
                "h": h,
            }
        )
        return
    output.print_table(
        ["Classes", "Images", "Correct", "Accuracy", "Macro F1"],
        [
            [name, f"{m.total:,}", f"{m.correct:,}", output.percent(m.accuracy), output.percent(m.macro_f1)]
            for name, m in results.items()
        ],
    )
    if h is not None:
        print(f"H, the harmonic mean of base and new: {output.percent(h)}")
