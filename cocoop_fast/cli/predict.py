"""``cocoop-fast predict``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cocoop_fast.cli import output
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.experiments.predict import Predictor

EPILOG = """
[bold]Examples[/bold]

The classes of a run: [cyan]cocoop-fast predict photo.jpg --run output/digits/cocoop/seed1[/cyan]

Classes of your own: [cyan]cocoop-fast predict *.jpg --run RUN_DIR --classes "tabby cat,red fox" --top-k 2[/cyan]

Nothing learned: [cyan]cocoop-fast predict photo.jpg --model ViT-B/16 --classes cat --classes dog[/cyan]
"""


def command(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.", show_default=False)],
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "-r",
            metavar="RUN_DIR",
            help="What `cocoop-fast train` wrote. Default: none, and zero-shot CLIP answers.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--classes",
            help="Names separated by commas; may be repeated. Default: those the run was trained on, "
            "or the digits that the embedded CLIP knows.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Classes to show of each image.")] = 5,
    model: Annotated[
        str | None,
        typer.Option(
            help="Without --run: an architecture of open_clip, or OpenAI's name.", show_default=False
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Without --run: tag or file of its weights.", show_default=False)
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Without --run: the prompt, e.g. 'a photo of a {}.'.", show_default=False),
    ] = None,
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
    if run is not None:
        for option, value in (("--model", model), ("--pretrained", pretrained), ("--template", template)):
            if value is not None:
                raise UserError(f"{option} is for predictions without --run; a run has its own.")

    with output.only_json(json):
        if run is None:
            predictor = _zero_shot(model, pretrained, template, names, device)
        else:
            from cocoop_fast.experiments.predict import Predictor

            predictor = Predictor.from_run(run, classnames=names, device=device)
        found = predictor.predict(images, topk=top_k)
    if json:
        output.print_json(
            {
                "command": "predict",
                "run_dir": None if run is None else str(run),
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


def _zero_shot(
    model: str | None,
    pretrained: str | None,
    template: str | None,
    names: list[str] | None,
    device: str | None,
) -> Predictor:
    """Nothing learned. The embedded CLIP knows digits, so these are its classes if none are given."""
    from cocoop_fast.cli import configuration
    from cocoop_fast.clip.load import load_clip
    from cocoop_fast.data import load_dataset
    from cocoop_fast.experiments.predict import Predictor
    from cocoop_fast.methods import build_model

    config = configuration.build(
        options={
            "model.name": ("--model", model),
            "model.pretrained": ("--pretrained", pretrained),
            "model.device": ("--device", device),
            "prompt.template": ("--template", template),
        },
        pairs=("prompt.method", "zeroshot"),
    ).config
    if names is None:
        if config.model.name != "demo":
            raise UserError(f"The classes to choose from are missing; with --model {model}, give --classes.")
        digits = load_dataset(config.data)
        names = list(digits.classnames)
        config = dataclasses.replace(
            config, prompt=dataclasses.replace(config.prompt, template=template or digits.template)
        )
    clip = load_clip(config.model)
    return Predictor(build_model(config.prompt, names, clip), clip, names)


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
