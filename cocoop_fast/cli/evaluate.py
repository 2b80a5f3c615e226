"""``cocoop-fast eval``."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.cli import options, output
from cocoop_fast.config import Subset


@options.command()
def command(
    run_dir: Path,
    *,
    subset: Subset | None = None,
    reference_checkpoint: Path | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Evaluate a finished run again, on the same or on other classes.

    Args:
        subset: Classes to evaluate on. Default: as the run was.
        reference_checkpoint: Learned parameters of the reference (model.pth.tar-N or its folder) in place of the run's
            own.

    Examples:
        What the run was evaluated on: eval output/digits/cocoop/seed1
        All classes together: eval output/digits/cocoop/seed1 --subset all --json
    """
    from cocoop_fast.cli.progress import observe
    from cocoop_fast.distributed.launch import join
    from cocoop_fast.evaluation.metrics import harmonic_mean
    from cocoop_fast.experiments import experiment

    with output.only_json(json), join() as ranks, observe(quiet=quiet or not ranks.is_first) as observer:
        results = experiment.evaluate_run(
            run_dir,
            subset=subset,
            reference_checkpoint=reference_checkpoint,
            observer=observer,
            ranks=ranks,
        )
    if not ranks.is_first:
        return
    h = None
    if {"base", "new"} <= set(results):
        h = harmonic_mean(results["base"].accuracy, results["new"].accuracy)
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
            [name, f"{m.total:,}", f"{m.correct:,}", output.shown(m.accuracy), output.shown(m.macro_f1)]
            for name, m in results.items()
        ],
    )
    if h is not None:
        print(f"H, the harmonic mean of base and new: {output.shown(h)}")
