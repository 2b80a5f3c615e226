"""``cocoop-fast datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cocoop_fast.cli import output
from cocoop_fast.config import DataConfig

EPILOG = """
[bold]Example[/bold]

What is there of your own images: [cyan]cocoop-fast datasets --root photos[/cyan]
"""


def command(
    root: Annotated[
        Path | None, typer.Option(help="Folder that holds, or is to hold, the images.", show_default=False)
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")
    ] = False,
) -> None:
    """List the data sets that are known, where they are looked for, and what is missing there."""
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
