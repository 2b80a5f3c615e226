"""``cocoop-fast eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cocoop_fast.cli import configuration, options, output
from cocoop_fast.cli.options import Given
from cocoop_fast.config import Subset
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.config import RunConfig
    from cocoop_fast.evaluation.metrics import Comparison


@options.command(fields="prompt.method data.name data.root model.name model.pretrained")
def command(
    run_dir: Path | None = None,
    *,
    config: list[Path] | None = None,
    given: Given,
    subset: Subset | None = None,
    reference_checkpoint: Path | None = None,
    shortlist: int | None = None,
    average_zero_shot: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Evaluate a finished run again, on the same or on other classes; or what the reference has learned.

    Without RUN_DIR, the options and files say on which images and with which model --reference-checkpoint is evaluated.

    Args:
        subset: Classes to evaluate on. Default: as the run was.
        reference_checkpoint: Learned parameters of the reference (model.pth.tar-N or its folder) in place of the run's
            own.
        shortlist: Choose among so many classes, each image's likeliest by the context without the image. Not exact: the
            result says how a sample of the images differs. Default: among all classes.
        average_zero_shot: Classify by the mean of the logits and zero-shot CLIP's, on all classes alike. The run's own
            results stay as they are.

    Examples:
        What the run was evaluated on: eval output/digits/cocoop/seed1
        All classes together: eval output/digits/cocoop/seed1 --subset all --json
        A thousand classes in a fraction of the time: eval RUN --shortlist 50
        Without a run: eval --reference-checkpoint model.pth.tar-10 --dataset eurosat --root DATA --model ViT-B/16
    """
    if run_dir is None and reference_checkpoint is None:
        raise UserError(
            "Give a run directory, or --reference-checkpoint with the data set and model it is of."
        )
    if run_dir is not None and (given or config):
        options_given = [option for option, _ in given.values()] or ["--config"]
        raise UserError(f"{run_dir} says its model and data itself; leave out {', '.join(options_given)}.")
    if shortlist is not None and shortlist < 1:
        raise UserError(f"--shortlist is {shortlist}, but a shortlist has at least one class.")
    with output.loading(silent=quiet):
        from cocoop_fast.cli.progress import observe
        from cocoop_fast.distributed.launch import join
        from cocoop_fast.evaluation.metrics import harmonic_mean
        from cocoop_fast.experiments import experiment

    with output.only_json(json), join() as ranks, observe(quiet=quiet or not ranks.is_first) as observer:
        if run_dir is not None:
            results = experiment.evaluate_run(
                run_dir,
                subset=subset,
                reference_checkpoint=reference_checkpoint,
                shortlist=shortlist,
                average_zero_shot=average_zero_shot,
                observer=observer,
                ranks=ranks,
            )
        else:
            assert reference_checkpoint is not None
            asked = config_of(reference_checkpoint, config, given, warn=ranks.is_first)
            asked = experiment.averaging_zero_shot(asked) if average_zero_shot else asked
            results = experiment.evaluate_reference(
                asked,
                reference_checkpoint,
                subset=subset,
                shortlist=shortlist,
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
        kept = ("total", "correct", "accuracy", "error", "macro_f1", "shortlist")
        output.print_json(
            {
                "command": "eval",
                "run_dir": None if run_dir is None else str(run_dir),
                "average_zero_shot": average_zero_shot,
                "results": {
                    name: {key: value for key, value in metrics.summary().items() if key in kept}
                    for name, metrics in results.items()
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
    for name, one in results.items():
        if one.shortlist is not None:
            output.say(_compared(name, one.shortlist))
    if h is not None:
        output.say(f"H, the harmonic mean of base and new: {output.shown(h)}")


def _compared(subset: str, found: Comparison) -> str:
    """How far the result by shortlists can be trusted."""
    low, high = found.interval
    return (
        f"{subset}: not exact, each image chose among {found.classes:,} classes. All classes, on {found.images:,} images "
        f"drawn at random (seed {found.seed}): the same answer for {found.agreeing:,} ({found.agreement:.2f} %); accuracy "
        f"{100 * found.correct / found.images:.2f} by shortlist, {100 * found.correct_of_all / found.images:.2f} among all, "
        f"{found.difference:+.2f} (95 % interval {low:+.2f} to {high:+.2f})."
    )


def config_of(checkpoint: Path, files: list[Path] | None, given: Given, *, warn: bool) -> RunConfig:
    """The configuration of a checkpoint of the reference: what its tensors say, and the rest by options and files.

    Raises:
        UserError: a checkpoint or file that cannot be read, or an unusable value.
    """
    from cocoop_fast.runs import reference_checkpoint

    learned = reference_checkpoint.load(checkpoint).parameters
    context = learned["ctx"]
    tensors = {
        "prompt.method": "cocoop" if any(name.startswith("meta_net.") for name in learned) else "coop",
        "prompt.ctx_init": "",  # whatever it began as, it is read from the file
        "prompt.n_ctx": context.shape[-2],
        "prompt.csc": context.ndim == 3,
    }
    said = {field: (str(checkpoint), value) for field, value in tensors.items()}
    built = configuration.build(files, {**said, **given})
    if warn:
        output.warn(built.warnings)
    return built.config
