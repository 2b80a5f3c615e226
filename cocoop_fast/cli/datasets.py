"""``cocoop-fast datasets``: list, check, download, and draw few-shot samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cocoop_fast.cli import failures, output
from cocoop_fast.config import DataConfig
from cocoop_fast.errors import UserError

EPILOG = """
[bold]Examples[/bold]

What is known, and what of it is there: [cyan]cocoop-fast datasets --root data[/cyan]

What one of them needs, and where to get it: [cyan]cocoop-fast datasets check oxford_pets --root data[/cyan]

Bring it: [cyan]cocoop-fast datasets download oxford_pets --root data[/cyan]

Write down who is in a few-shot sample: [cyan]cocoop-fast datasets sample oxford_pets --root data --shots 16 --seed 1[/cyan]
"""

_SHOWN = 5

app = typer.Typer(
    epilog=EPILOG,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(help="A name that `cocoop-fast datasets` lists, or the reference's.")]
Root = Annotated[
    Path | None,
    typer.Option(
        help="Directory of all published data sets; of your own, their folder or list.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")]


@app.callback(invoke_without_command=True)
def listing(context: typer.Context, root: Root = None, json: Json = False) -> None:
    """List the data sets that are known, where they are looked for, and what is missing there."""
    if context.invoked_subcommand is not None:
        return
    from cocoop_fast.data.registry import REGISTRY

    found = [
        {
            "name": entry.name,
            "title": entry.title,
            "layout": entry.layout,
            "missing": list(entry.missing(DataConfig(name=entry.name, root=root))),
        }
        for entry in REGISTRY.values()
    ]
    if json:
        output.print_json(
            {"command": "datasets", "root": None if root is None else str(root), "datasets": found}
        )
        return
    output.print_table(
        ["Name", "What", "Looked for in", "Missing"],
        [
            [
                str(row["name"]),
                str(row["title"]),
                str(row["layout"]) or "the package itself",
                ", ".join(row["missing"]) or "nothing",
            ]
            for row in found
        ],
        left=4,
    )


@app.command()
def check(name: Name, root: Root = None, json: Json = False) -> None:
    """Say what of one data set is there, where to get the rest, and whether its images are complete.

    The exit status is 1 if something is missing.
    """
    from cocoop_fast.data.inventory import take_inventory

    found = take_inventory(DataConfig(name=name, root=root))
    if json:
        output.print_json(
            {
                "command": "datasets check",
                "name": name,
                "complete": found.complete and not found.absent,
                "parts": [
                    {"path": part.path, "there": there, "source": part.source} for part, there in found.parts
                ],
                "counts": None if found.counts is None else found.counts._asdict(),
                "published": None if found.published is None else found.published._asdict(),
                "absent": list(found.absent),
            }
        )
    else:
        if found.parts:
            output.print_table(
                ["Part", "There", "Where to get it"],
                [[part.path, "yes" if there else "no", part.source] for part, there in found.parts],
                left=3,
            )
        if found.counts is not None:
            rows = [["here", *(f"{count:,}" for count in found.counts)]]
            if found.published is not None:
                rows.append(["published", *(f"{count:,}" for count in found.published)])
            output.print_table(["", "Classes", "Train", "Val", "Test"], rows)
        if found.absent:
            count = len(found.absent)
            which = "1 listed image is" if count == 1 else f"{count:,} listed images are"
            more = ", ..." if count > _SHOWN else ""
            print(f"{which} not there: {', '.join(found.absent[:_SHOWN])}{more}.")
    if not found.complete or found.absent:
        raise typer.Exit(failures.FAILED)


@app.command()
def download(name: Name, root: Root = None, json: Json = False) -> None:
    """Download one data set into the layout that is looked for, with progress and checksums."""
    from cocoop_fast.data import download as downloads
    from cocoop_fast.data.registry import canonical_name
    from cocoop_fast.data.sets import SETS
    from cocoop_fast.data.sets.record import missing_parts

    published = SETS.get(canonical_name(name))
    if published is None:
        raise UserError(f"There is nothing to download for {name!r}.")
    if root is None:
        raise UserError("Say where to put the data set with --root DIR.")
    with output.only_json(True):  # whatever a downloader prints is progress
        folder = downloads.download(published, root)
    split = published.split
    if split is not None and not (folder / split.path).exists():
        advice = f"For results that compare with published ones, {downloads.by_hand((split,), folder)}."
        output.warn([advice])
    if json:
        missing = [part.path for part in missing_parts(published, folder)]
        output.print_json({"command": "datasets download", "path": str(folder), "missing": missing})
    else:
        print(f"{published.name} is in {folder}.")


@app.command()
def sample(
    name: Name,
    root: Root = None,
    shots: Annotated[int, typer.Option(help="Training images a class.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 1,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Convert this cache of the reference instead of drawing.", show_default=False
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write; default: split_fewshot/ beside the images.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a few-shot sample down, as a file that gives the same images on another machine."""
    from cocoop_fast.data import few_shot_files, load_dataset
    from cocoop_fast.data.few_shot import sample_shots

    if shots < 1 or seed < 0:
        raise UserError(f"--shots is {shots} and --seed {seed}; give 1 or more, and 0 or more.")
    dataset = load_dataset(DataConfig(name=name, root=root))
    if dataset.test_only:
        raise UserError(f"{dataset.name} has test images only, so there is nothing to draw from.")
    folder = folder or dataset.few_shot_dir
    if folder is None:
        raise UserError("Say where to write the sample with --output DIR.")
    drawn = (
        sample_shots(dataset, shots, seed)
        if source is None
        else few_shot_files.read_few_shot(source, dataset, shots)
    )
    path = few_shot_files.write_few_shot(folder, drawn, shots, seed)
    if json:
        output.print_json({"command": "datasets sample", "path": str(path), "images": len(drawn.train)})
    else:
        print(f"{len(drawn.train):,} training images of {len(dataset.classnames):,} classes: {path}")
