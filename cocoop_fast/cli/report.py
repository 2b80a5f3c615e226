"""``cocoop-fast report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cocoop_fast.cli import output
from cocoop_fast.errors import UserError

EPILOG = """
[bold]Examples[/bold]

A table of the paper: [cyan]cocoop-fast report output/base2new[/cyan]

Some runs side by side: [cyan]cocoop-fast report output/digits/cocoop/seed1 output/digits/coop/seed1 -o page[/cyan]

Only what is on disk, no model: [cyan]cocoop-fast report output/base2new --close-ups 0[/cyan]
"""


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="What `train`, `run` or `sweep` wrote; several may be given.",
            show_default=False,
        ),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "-o",
            help="Where report.html and its plots go. Default: RUN/report, or report for several.",
            show_default=False,
        ),
    ] = None,
    close_ups: Annotated[
        int,
        typer.Option(
            help="Runs to look at closely, one of each method on each data set: their model is loaded and shown test "
            "images. 0: none."
        ),
    ] = 6,
    images: Annotated[
        int, typer.Option(help="Test images that each of them is shown at most, of base and of new classes.")
    ] = 2000,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N; default: as the run's.", show_default=False)
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")] = False,
) -> None:
    """Make a page about runs: one HTML file that needs no other, and its plots as SVG and PNG beside it.

    Results against published numbers, learning curves, classes that are confused, examples, what the context learned,
    time and memory. Unfinished runs are shown as far as they are.
    """
    if close_ups < 0:
        raise UserError(f"--close-ups is {close_ups}, but it must be at least 0.")
    if images < 1:
        raise UserError(f"--images is {images}, but it must be at least 1.")
    folder = output_dir or (runs[0] / "report" if len(runs) == 1 else Path("report"))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder} is a file; name a directory.")

    from cocoop_fast.report.make_report import make_report

    with output.only_json(json):
        report = make_report(
            runs,
            close_ups=close_ups,
            most_images=images,
            device=device,
            tell=(lambda line: None) if quiet or json else _tell,
        )
        page = report.write(folder)
    if json:
        plots = [f"{picture.name}{suffix}" for picture in report.pictures for suffix in (".svg", ".png")]
        output.print_json({"command": "report", "page": str(page), "plots": plots})
    else:
        print(f"Written: {page}, with {len(report.pictures)} plots as SVG and PNG beside it")


def _tell(line: str) -> None:
    print(f"report: {line}", file=sys.stderr, flush=True)
