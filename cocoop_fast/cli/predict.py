"""``cocoop-fast predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cocoop_fast.cli import output
from cocoop_fast.errors import UserError

EPILOG = """
[bold]Examples[/bold]

The classes of the run: [cyan]cocoop-fast predict photo.jpg --run output/digits/cocoop/seed1[/cyan]

Classes of your own: [cyan]cocoop-fast predict *.jpg --run RUN_DIR --classes "tabby cat,red fox" --top-k 2[/cyan]
"""


def command(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.", show_default=False)],
    run: Annotated[
        Path,
        typer.Option(
            "--run", "-r", metavar="RUN_DIR", help="What `cocoop-fast train` wrote.", show_default=False
        ),
    ],
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--classes",
            help="Names separated by commas; may be repeated. Default: those the run was trained on.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Classes to show of each image.")] = 5,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N; default: as the run's.", show_default=False)
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")
    ] = False,
) -> None:
    """Name what images show, with probabilities."""
    if top_k < 1:
        raise UserError(f"--top-k is {top_k}, but it must be at least 1.")
    names = class_list(classes)

    from cocoop_fast.evaluation.predict import Predictor

    with output.only_json(json):
        predictor = Predictor.from_run(run, classnames=names, device=device)
        found = predictor.predict(images, topk=min(top_k, len(predictor.classnames)))
    if json:
        output.print_json(
            {
                "command": "predict",
                "run_dir": str(run),
                "predictions": [
                    {"image": str(image), "classes": [{"name": name, "probability": p} for name, p in ranked]}
                    for image, ranked in zip(images, found, strict=True)
                ],
            }
        )
        return
    rows = [
        [str(image) if place == 0 else "", name, f"{100 * p:.2f} %"]
        for image, ranked in zip(images, found, strict=True)
        for place, (name, p) in enumerate(ranked)
    ]
    output.print_table(["Image", "Class", "Probability"], rows, left=2)


def class_list(texts: list[str] | None) -> list[str] | None:
    """Names from repeated, comma-separated lists; ``None`` if none was given.

    Raises:
        UserError: an empty name, or one name given twice.
    """
    if not texts:
        return None
    names = [" ".join(name.split()) for text in texts for name in text.split(",")]
    if "" in names:
        raise UserError(
            "--classes has an empty class name; separate names by single commas, as in 'cat,dog'."
        )
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"--classes names {twice!r} twice.")
    return names
