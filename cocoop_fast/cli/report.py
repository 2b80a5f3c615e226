"""``cocoop-fast report``."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.cli import options, output
from cocoop_fast.cli.options import AtLeastOne, NotNegative


@options.command()
def command(
    runs: list[Path],
    *,
    output_dir: Path | None = None,
    close_ups: NotNegative = 6,
    images: AtLeastOne = 2000,
    device: str | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Make a page about runs: one HTML file that needs no other, and its plots as SVG and PNG beside it.

    Results against published numbers, learning curves, classes that are confused, examples, what the context learned,
    time and memory. Unfinished runs are shown as far as they are.

    Args:
        runs: What `train` or `run` wrote; several may be given.
        output_dir: Where report.html and its plots go. Default: RUN/report, or report for several.
        close_ups: Runs to look at closely, one of each method on each data set: their model is loaded and shown test
            images. 0: none.
        images: Test images that each of them is shown at most, of base and of new classes.
        device: auto, cpu, cuda or cuda:N. Default: as the run's.

    Examples:
        A table of the paper: report output/base2new
        Some runs side by side: report output/digits/cocoop/seed1 output/digits/coop/seed1 -o page
        Only what is on disk, no model: report output/base2new --close-ups 0
    """
    folder = output_dir or (runs[0] / "report" if len(runs) == 1 else Path("report"))
    options.refuse_file(folder)

    from cocoop_fast.report.make_report import make_report

    with output.only_json(json):
        tell = output.teller("report", silent=quiet or json)
        report = make_report(runs, close_ups=close_ups, most_images=images, device=device, tell=tell)
        page = report.write(folder)
    if json:
        plots = [f"{picture.name}{suffix}" for picture in report.pictures for suffix in (".svg", ".png")]
        output.print_json({"command": "report", "page": str(page), "plots": plots})
    else:
        output.say(f"Written: {page}, with {len(report.pictures)} plots as SVG and PNG beside it")
