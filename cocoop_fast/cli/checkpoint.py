"""``cocoop-fast checkpoint``: from and to the reference's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cocoop_fast.cli import configuration, output

EPILOG = """
[bold]Examples[/bold]

Go on with a run that the reference began: [cyan]cocoop-fast checkpoint import output/seed1 -c eurosat.yaml -c vit_b16_c4_ep10_batch1_ctxv1.yaml --root DATA -o runs/eurosat[/cyan]

Give a run to somebody who uses the reference: [cyan]cocoop-fast checkpoint export runs/eurosat -o output/seed1[/cyan]
"""

app = typer.Typer(
    help="Import and export what the reference implementation calls prompt_learner/model.pth.tar-N.",
    epilog=EPILOG,
    rich_markup_mode="rich",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")]


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A model.pth.tar-N, or the folder that holds it.")
    ],
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY VALUE]...", help="As for `train`.", show_default=False)
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", help="What it was trained with; may be repeated.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="One of `cocoop-fast datasets`.", show_default=False)
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the images.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the run.", show_default=False)] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Run directory to make.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard a run that is there.")] = False,
    json: Json = False,
) -> None:
    """Make a run directory that `train` goes on with, from a checkpoint of the reference.

    What was learned, the momentum and the place in the schedule are taken over. No code in the file is run.
    """
    built = configuration.build(
        files=config or (),
        options={
            "data.name": ("--dataset", dataset),
            "data.root": ("--root", root),
            "seed": ("--seed", seed),
            "output_dir": ("--output-dir", output_dir),
        },
        pairs=pairs or (),
    )
    output.warn(built.warnings)

    from cocoop_fast.experiments.reference_import import import_checkpoint

    with output.only_json(json):
        folder, epochs = import_checkpoint(built.config, file, overwrite=overwrite)
    if json:
        output.print_json({"command": "checkpoint import", "run_dir": str(folder), "epochs": epochs})
    else:
        print(f"Epoch {epochs} is done in {folder}. To go on: cocoop-fast train -c {folder}/config.yaml")


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="What `cocoop-fast train` wrote.")],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for prompt_learner/. Default: RUN_DIR.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a run's newest checkpoint so that the reference reads it."""
    from cocoop_fast.experiments.reference_import import export_checkpoint

    with output.only_json(json):
        path = export_checkpoint(run_dir, folder)
    if json:
        output.print_json({"command": "checkpoint export", "path": str(path)})
    else:
        print(f"{path}")
