"""``cocoop-fast train``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cocoop_fast.cli import configuration, options, output
from cocoop_fast.cli.options import Given
from cocoop_fast.errors import UserError
from cocoop_fast.variants import name_of, plain

if TYPE_CHECKING:
    from cocoop_fast.experiments.experiment import Results

FIELDS = """
prompt.method data.name data.root data.class_names data.shots data.subset model.name model.pretrained prompt.ctx_init prompt.n_ctx prompt.csc
prompt.class_position prompt.ensemble prompt.attributes prompt.ablate_image seed
optim.epochs optim.batch_size optim.lr optim.consistency optim.average optim.prune_mass reference_compat
model.precision model.backend model.memory_budget model.device model.shard data.workers data.skip_bad_images
data.cache_views optim.on_nonfinite
output_dir checkpoint_steps
"""


@options.command(fields=FIELDS)
def command(
    pairs: list[str] | None = None,
    *,
    config: list[Path] | None = None,
    given: Given,
    trainer: str | None = None,
    compare: str | None = None,
    no_compare: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    track: list[str] | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Learn prompts, and evaluate them on the classes seen and not seen in training.

    With no arguments: CoCoOp on the embedded digits (16 images of each of the first five classes) with the
    embedded CLIP, compared with zero-shot CLIP and CoOp. An interrupted run goes on when called again.

    Args:
        trainer: The reference's name of the method, for its files and keys: CoCoOp, CoOp, ZeroshotCLIP or ZeroshotCLIP2.
        compare: Train and evaluate further methods too; without a value, all of them. Default: on if nothing was said
            about the experiment.
        no_compare: Only the one method.
        overwrite: Begin anew. Default: go on with, or read, what is there.
        tensorboard: Also write TensorBoard event files, to RUN/tensorboard.
        track: Also tell wandb, mlflow or trackio; may be repeated.

    Examples:
        The demonstration, with its comparison: train
        Your own images: train --dataset folder --root photos --model ViT-B/16
        Files of ours or of the reference: train -c vit_b16_c4_ep10_batch1_ctxv1.yaml --root photos
        Files of the reference that do not say whose they are: train --trainer CoOp -c vit_b16_ctxv1.yaml -c eurosat.yaml
            --root DATA
        Any other field: train --shots 4 optim.momentum 0.8 optim.warmup_epochs 2
    """
    built = configuration.build(config, given, [*trainer_pair(trainer), *(pairs or ())])
    compared = methods_to_compare(compare, no_compare, built)

    with output.loading(silent=quiet):
        from cocoop_fast.cli.progress import observe
        from cocoop_fast.distributed.launch import join
        from cocoop_fast.experiments import experiment
        from cocoop_fast.report.tensorboard import TensorBoardLog
        from cocoop_fast.report.trackers import trackers
        from cocoop_fast.training.observer import Observer, Observers

    with output.only_json(json), join() as ranks, observe(quiet=quiet or not ranks.is_first) as observer:
        if ranks.is_first:
            output.warn(built.warnings)
            also: list[Observer] = [TensorBoardLog()] if tensorboard else []
            also += trackers(track) if track else []
            observer = Observers(observer, *also) if also else observer
        results = experiment.run(
            built.config, compare=compared, observer=observer, overwrite=overwrite, ranks=ranks
        )
    if not ranks.is_first:
        return
    if json:
        rows = [row.to_mapping() for row in results.rows]
        output.print_json({"command": "train", "output_dir": str(results.output_dir), "rows": rows})
    else:
        _print(results)


def trainer_pair(trainer: str | None) -> list[str]:
    """``--trainer`` as the key that it stands for, of the reference's train.py."""
    return [] if trainer is None else ["TRAINER.NAME", trainer]


def methods_to_compare(
    compare: str | None, no_compare: bool, built: configuration.Configuration
) -> tuple[str, ...]:
    """The methods to run besides the configured one.

    Raises:
        UserError: an unknown method, or both ``--compare`` and ``--no-compare``.
    """
    if compare is not None and no_compare:
        raise UserError("--compare and --no-compare exclude each other.")
    if no_compare or (compare is None and not built.is_default_experiment):
        return ()
    text = compare or "all"
    named = options.PAPER_METHODS if text == "all" else options.methods_of(text, "--compare")
    return tuple(name for name in named if name != name_of(built.config))


def _print(results: Results) -> None:
    from cocoop_fast.methods.records import METHODS, method_title  # needs torch, as a run does

    output.print_table(
        ["Method", "Base", "New", "H", "All", "Seed", "Trained in"],
        [
            [
                method_title(row.method),
                *(output.shown(value) for value in (row.base, row.new, row.h, row.all)),
                str(row.seed),
                output.shown(row.train_seconds or None, "{:.1f} s".format),
            ]
            for row in sorted(
                results.rows, key=lambda row: (list(METHODS).index(plain(row.method)), row.method)
            )
        ],
    )
    if any(row.h is not None for row in results.rows):
        output.say(
            "Accuracy in percent. Base: classes trained on; new: classes never seen; H: their harmonic mean."
        )
    output.say(f"Run directory: {results.output_dir}")
    directory = shlex.quote(str(results.output_dir))
    if sys.stdout.isatty():
        output.say(
            f"Next: cocoop-fast report {directory}, a page with plots; cocoop-fast predict IMAGE --run {directory}."
        )
