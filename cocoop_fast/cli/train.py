"""``cocoop-fast train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from cocoop_fast.cli import configuration, output
from cocoop_fast.config import Method
from cocoop_fast.errors import UserError
from cocoop_fast.readable import METHOD_TITLES

if TYPE_CHECKING:
    from cocoop_fast.experiments.experiment import Results
    from cocoop_fast.training.observer import Observer

METHODS: tuple[str, ...] = get_args(Method)

EPILOG = """
[bold]Examples[/bold]

The demonstration, with its comparison: [cyan]cocoop-fast train[/cyan]

Your own images: [cyan]cocoop-fast train --dataset folder --root photos --model ViT-B/16[/cyan]

Files of ours or of the reference: [cyan]cocoop-fast train -c vit_b16_c4_ep10_batch1_ctxv1.yaml --root photos[/cyan]

Any other field: [cyan]cocoop-fast train --shots 4 optim.momentum 0.8 OPTIM.WARMUP_EPOCH 2[/cyan]
"""

WHAT, RECIPE, MACHINE, SHOWN = "What is learned", "Recipe", "Machine", "Output"


def _option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


def command(
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY VALUE",
            help="Any other field, e.g. optim.momentum 0.8, or a key of the reference, e.g. OPTIM.MOMENTUM 0.8.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        _option(
            WHAT,
            "--config",
            "-c",
            help="YAML file, ours or the reference's; may be repeated, later ones win.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option(WHAT, "--method", "-m", metavar="|".join(METHODS), help="What to train. Default: cocoop."),
    ] = None,
    dataset: Annotated[
        str | None, _option(WHAT, "--dataset", "-d", help="One of `cocoop-fast datasets`. Default: digits.")
    ] = None,
    root: Annotated[
        Path | None, _option(WHAT, "--root", help="Folder of the images; alone it implies --dataset folder.")
    ] = None,
    shots: Annotated[
        int | None, _option(WHAT, "--shots", help="Training images a class; 0 is all. Default: 16.")
    ] = None,
    subset: Annotated[
        str | None,
        _option(
            WHAT,
            "--subset",
            metavar="base|new|all",
            help="Classes to train on: a half, or all. Default: base.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        _option(
            WHAT,
            "--model",
            help="open_clip architecture, OpenAI's name such as ViT-B/16, or hf-hub:OWNER/NAME. Default: demo.",
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        _option(
            WHAT,
            "--pretrained",
            help="open_clip tag of the weights, hf-hub:OWNER/NAME, or a file of open_clip or OpenAI.",
        ),
    ] = None,
    ctx_init: Annotated[
        str | None,
        _option(
            WHAT, "--ctx-init", help="Words the context begins from; empty: random. Default: a photo of a."
        ),
    ] = None,
    n_ctx: Annotated[
        int | None,
        _option(WHAT, "--n-ctx", help="Length of a random context; alone it implies --ctx-init ''."),
    ] = None,
    csc: Annotated[
        bool, _option(WHAT, "--csc", help="A context for each class; begins from random vectors.")
    ] = False,
    class_position: Annotated[
        str | None,
        _option(
            WHAT,
            "--class-position",
            metavar="end|middle|front",
            help="Of the class name, after, amid or before the context. Default: end.",
        ),
    ] = None,
    ensemble: Annotated[
        str | None,
        _option(
            WHAT,
            "--ensemble",
            metavar="none|select|imagenet",
            help="Zero-shot: also the reference's seven templates, or OpenAI's 80. Default: none.",
        ),
    ] = None,
    seed: Annotated[
        int | None, _option(WHAT, "--seed", help="Draws the shots, their order and crops. Default: 1.")
    ] = None,
    compare: Annotated[
        str | None,
        _option(
            WHAT,
            "--compare",
            metavar="[METHOD,...]",
            help="Train and evaluate further methods too; without a value, all of them. "
            "Default: on if nothing was said about the experiment.",
        ),
    ] = None,
    no_compare: Annotated[bool, _option(WHAT, "--no-compare", help="Only the one method.")] = False,
    epochs: Annotated[int | None, _option(RECIPE, "--epochs", help="Default: CoCoOp 10, CoOp 200.")] = None,
    batch_size: Annotated[
        int | None, _option(RECIPE, "--batch-size", "-b", help="Images a step. Default: CoCoOp 1, CoOp 32.")
    ] = None,
    lr: Annotated[float | None, _option(RECIPE, "--lr", help="Learning rate. Default: 0.002.")] = None,
    reference_compat: Annotated[
        bool,
        _option(
            RECIPE, "--reference-compat", help="With defects of the reference: docs/migration.md lists them."
        ),
    ] = False,
    precision: Annotated[
        str | None,
        _option(
            MACHINE,
            "--precision",
            metavar="auto|fp32|fp16|bf16|amp",
            help="Default: auto, fp32 on a CPU and fp16 on a GPU.",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        _option(
            MACHINE, "--backend", metavar="auto|torch|cpu|triton|cuda", help="Who computes. Default: auto."
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        _option(
            MACHINE,
            "--memory-budget",
            metavar="<amount>",
            help="For all that a step allocates, e.g. 4GB; the result is the same. Default: most of what is free.",
        ),
    ] = None,
    prune_mass: Annotated[
        float | None,
        _option(
            RECIPE,
            "--prune-mass",
            help="Leave the unlikeliest classes out of backward, up to this share of the wrong classes' probability. "
            "Default: 0, exact.",
        ),
    ] = None,
    device: Annotated[
        str | None, _option(MACHINE, "--device", help="auto, cpu, cuda or cuda:N. Default: auto.")
    ] = None,
    shard: Annotated[
        str | None,
        _option(
            MACHINE,
            "--shard",
            metavar="images|classes|both",
            help="What the processes of torchrun share out. Default: images, or classes in batches of one.",
        ),
    ] = None,
    workers: Annotated[
        int | None, _option(MACHINE, "--workers", "-w", help="Processes that read images. Default: 0.")
    ] = None,
    skip_bad_images: Annotated[
        bool, _option(MACHINE, "--skip-bad-images", help="Leave images out that cannot be read, and say so.")
    ] = False,
    cache_views: Annotated[
        int | None,
        _option(
            MACHINE,
            "--cache-views",
            help="Train on so many fixed augmented views of each image, encoded once and kept on disk. "
            "Default: 0, new views each epoch.",
        ),
    ] = None,
    on_nonfinite: Annotated[
        str | None,
        _option(
            MACHINE,
            "--on-nonfinite",
            metavar="stop|skip",
            help="At a step whose loss or gradient is NaN or infinite. Default: stop.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        _option(SHOWN, "--output-dir", "-o", help="Run directory. Default: output/DATASET/METHOD/seedSEED."),
    ] = None,
    overwrite: Annotated[
        bool, _option(SHOWN, "--overwrite", help="Begin anew; default: go on with, or read, what is there.")
    ] = False,
    checkpoint_steps: Annotated[
        int | None,
        _option(SHOWN, "--checkpoint-steps", help="Save every so many steps, not only each epoch."),
    ] = None,
    tensorboard: Annotated[
        bool, _option(SHOWN, "--tensorboard", help="Also write TensorBoard event files, to RUN/tensorboard.")
    ] = False,
    json: Annotated[
        bool, _option(SHOWN, "--json", help="Print one line of JSON on stdout, and nothing else.")
    ] = False,
    quiet: Annotated[bool, _option(SHOWN, "--quiet", "-q", help="No progress; only the result.")] = False,
) -> None:
    """Learn prompts, and evaluate them on the classes seen and not seen in training.

    With no arguments: CoCoOp on the embedded digits (16 images of each of the first five classes) with the
    embedded CLIP, compared with zero-shot CLIP and CoOp. An interrupted run goes on when called again.
    """
    built = configuration.build(
        files=config or (),
        options={
            "prompt.method": ("--method", method),
            "data.name": ("--dataset", dataset),
            "data.root": ("--root", root),
            "data.shots": ("--shots", shots),
            "data.subset": ("--subset", subset),
            "model.name": ("--model", model),
            "model.pretrained": ("--pretrained", pretrained),
            "prompt.ctx_init": ("--ctx-init", ctx_init),
            "prompt.n_ctx": ("--n-ctx", n_ctx),
            "prompt.csc": ("--csc", csc or None),
            "prompt.class_position": ("--class-position", class_position),
            "prompt.ensemble": ("--ensemble", ensemble),
            "seed": ("--seed", seed),
            "optim.epochs": ("--epochs", epochs),
            "optim.batch_size": ("--batch-size", batch_size),
            "optim.lr": ("--lr", lr),
            "model.precision": ("--precision", precision),
            "model.backend": ("--backend", backend),
            "model.memory_budget": ("--memory-budget", memory_budget),
            "optim.prune_mass": ("--prune-mass", prune_mass),
            "model.device": ("--device", device),
            "model.shard": ("--shard", shard),
            "data.workers": ("--workers", workers),
            "data.cache_views": ("--cache-views", cache_views),
            "optim.on_nonfinite": ("--on-nonfinite", on_nonfinite),
            "reference_compat": ("--reference-compat", reference_compat or None),
            "data.skip_bad_images": ("--skip-bad-images", skip_bad_images or None),
            "output_dir": ("--output-dir", output_dir),
            "checkpoint_steps": ("--checkpoint-steps", checkpoint_steps),
        },
        pairs=pairs or (),
    )
    compared = methods_to_compare(compare, no_compare, built)

    from cocoop_fast.cli.progress import observe
    from cocoop_fast.distributed.launch import join
    from cocoop_fast.experiments import experiment

    with output.only_json(json), join() as ranks, observe(quiet=quiet or not ranks.is_first) as observer:
        if ranks.is_first:
            output.warn(built.warnings)
            observer = with_tensorboard(observer) if tensorboard else observer
        results = experiment.run(
            built.config,
            compare=compared,  # type: ignore[arg-type]
            observer=observer,
            overwrite=overwrite,
            ranks=ranks,
        )
    if not ranks.is_first:
        return
    if json:
        rows = [row.to_mapping() for row in results.rows]
        output.print_json({"command": "train", "output_dir": str(results.output_dir), "rows": rows})
    else:
        _print(results)


def with_tensorboard(observer: Observer) -> Observer:
    """The same, and event files besides.

    Raises:
        UserError: the package tensorboard is not installed.
    """
    from cocoop_fast.report.tensorboard import TensorBoardLog
    from cocoop_fast.training.observer import Observers

    return Observers(observer, TensorBoardLog())


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
    if compare in (None, "all"):
        names = ["zeroshot", "coop", "cocoop"]
    else:
        names = [name.strip().lower() for name in compare.split(",")]
        for name in names:
            if name not in METHODS:
                raise UserError(f"--compare: there is no method {name!r}; choose from {', '.join(METHODS)}.")
    return tuple(name for name in dict.fromkeys(names) if name != built.config.prompt.method)


def complete_compare(arguments: Sequence[str]) -> list[str]:
    """Give a bare ``--compare`` its value, "all"; the parser knows only options with a value and without one."""
    completed: list[str] = []
    fields = configuration.field_names()
    for position, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[position + 1] if position + 1 < len(arguments) else "-"
        # What follows may also be the next option, or the first key of the trailing pairs.
        if argument == "--compare" and (following.startswith("-") or "." in following or following in fields):
            completed.append("all")
    return completed


def _print(results: Results) -> None:
    columns = ["Method", "Base", "New", "H", "All", "Seed", "Trained in"]
    rows = [
        [
            METHOD_TITLES.get(row.method, row.method),
            *(output.percent(value) for value in (row.base, row.new, row.h, row.all)),
            str(row.seed),
            f"{row.train_seconds:.1f} s" if row.train_seconds else output.NOTHING,
        ]
        for row in sorted(results.rows, key=lambda row: list(METHOD_TITLES).index(row.method))
    ]
    # Only what was measured: a run on the base classes has no accuracy over all of them, and the other way round.
    kept = [i for i, _ in enumerate(columns) if any(row[i] != output.NOTHING for row in rows)]
    output.print_table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
    if columns.index("H") in kept:
        print(
            "Accuracy in percent. Base: classes trained on; new: classes never seen; H: their harmonic mean."
        )
    print(f"Run directory: {results.output_dir}")
