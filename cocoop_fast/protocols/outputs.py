"""What an experiment leaves in its directory: results.json, table.csv, table.md and table.tex (docs/protocols.md)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from operator import methodcaller
from typing import Any

from cocoop_fast.config import flatten, to_mapping
from cocoop_fast.files.atomic import write_atomically, write_json
from cocoop_fast.files.provenance import provenance
from cocoop_fast.methods.records import method_title
from cocoop_fast.protocols.cells import Experiment
from cocoop_fast.protocols.published import UNCHECKED, published_setting
from cocoop_fast.protocols.run_cell import Outcome
from cocoop_fast.protocols.table import Entry, by_row, make_table, metrics_of
from cocoop_fast.variants import FIELDS

FORMAT, VERSION = "cocoop_fast protocol results", 1
NOTHING = "-"
_BY_CELL = {"seed", "output_dir", "prompt.method", "data.name", "data.root", "data.subset", *FIELDS}


def write_outputs(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Write the four files, each whole or not at all. Returns what results.json holds."""
    entries = make_table(experiment, outcomes)
    results = _mapping(experiment, outcomes, entries)
    experiment.root.mkdir(parents=True, exist_ok=True)
    write_json(experiment.root / "results.json", results)
    tables = {
        "table.csv": _csv(entries),
        "table.md": markdown(experiment, outcomes),
        "table.tex": latex(entries),
    }
    for name, text in tables.items():
        write_atomically(experiment.root / name, methodcaller("write", text.encode()))
    return results


def columns_and_rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """The table as text: a row for each data set and method, and the paper's numbers in a row below it."""
    metrics = metrics_of(entries)
    rows = []
    for dataset, methods in by_row(entries).items():
        for method, row in methods.items():
            title = method_title(method)
            rows.append([dataset, title, *(str(row.get(metric, NOTHING)) for metric in metrics)])
            paper = [row[metric].published if metric in row else None for metric in metrics]
            if any(paper):
                rows.append(["", f"{title}, paper", *(str(number or NOTHING) for number in paper)])
    return ["Data set", "Method", *metrics.values()], rows


def notes(entries: Sequence[Entry], outcomes: Sequence[Outcome] = ()) -> list[str]:
    """What a reader must know to compare the numbers, and which of the cells are missing; a line each."""
    lines = []
    seeds = sorted({seed for entry in entries for seed in entry.seeds})
    if seeds:
        over = ": mean ± standard deviation over" if any(entry.std is not None for entry in entries) else ","
        named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        lines.append(f"Test accuracy in percent{over} {named}.")
    if any(entry.metric == "h" for entry in entries):
        lines.append("H: harmonic mean of the mean base and new accuracies.")
    published = [entry.published for entry in entries if entry.published]
    if published:
        lines.append(f"Published: {published_setting()}.")
    if any(not number.checked for number in published):
        lines.append(
            f"{UNCHECKED} not checked against a second source or a sum: look it up before quoting it."
        )
    missing = sum(outcome.status != "finished" for outcome in outcomes)
    if missing:
        lines.append(f"{missing} of {len(outcomes)} cells are missing.")
    return lines


def markdown(experiment: Experiment, outcomes: Sequence[Outcome]) -> str:
    """The table with its title and notes."""
    entries = make_table(experiment, outcomes)
    columns, rows = columns_and_rows(entries)
    lines = [f"# {experiment.protocol.title}", ""]
    if rows:
        rule = ["---", "---"] + ["---:"] * (len(columns) - 2)
        lines += [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]
        lines.append("")
    config = experiment.config
    model = " ".join(filter(None, (config.model.name, config.model.pretrained)))
    shots = ", ".join(map(str, experiment.shots)) or config.data.shots or "all"
    lines.append(f"- Model {model}, {shots} shots.")
    lines += [f"- {note}" for note in notes(entries, outcomes)]
    return "\n".join(lines) + "\n"


_LATEX = str.maketrans(
    {**{sign: f"\\{sign}" for sign in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
     "^": r"\textasciicircum{}", "±": r"$\pm$", "†": r"$\dagger$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$"}
)  # fmt: skip


def latex(entries: Sequence[Entry], name: Callable[[str], str] = method_title) -> str:
    """The table for a paper, in LaTeX with the package booktabs; the notes are comments above it.

    Args:
        entries: of the table.
        name: a method's name as it is printed.
    """
    metrics = metrics_of(entries)
    columns = ["Data set", "Method", *metrics.values()]
    lines = [*(f"% {note}" for note in notes(entries)), r"% \usepackage{booktabs}"]
    lines += [rf"\begin{{tabular}}{{ll{'r' * len(metrics)}}}", r"\toprule", _latex_row(columns)]
    for dataset, methods in by_row(entries).items():
        lines.append(r"\midrule")
        shown = dataset.replace("_", " ")
        for method, row in methods.items():
            values = [row.get(metric) for metric in metrics]
            lines.append(_latex_row([shown, name(method), *(str(value or NOTHING) for value in values)]))
            paper = [value.published if value else None for value in values]
            if any(paper):
                lines.append(
                    _latex_row(["", f"{name(method)}, published", *(str(one or NOTHING) for one in paper)])
                )
            shown = ""
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"


def _csv(entries: Sequence[Entry]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "method", "metric", "mean", "std", "n", "published", "published_checked"])
    for entry in entries:
        row = [entry.dataset, entry.method, entry.metric, entry.mean, entry.std, len(entry.seeds)]
        paper = entry.published
        writer.writerow([*row, paper and paper.value, paper and paper.checked])
    return text.getvalue()


def _mapping(experiment: Experiment, outcomes: Sequence[Outcome], entries: Sequence[Entry]) -> dict[str, Any]:
    common = flatten(to_mapping(experiment.config))
    by_cell = {*_BY_CELL, "data.shots"} if experiment.shots else _BY_CELL
    return {
        "format": FORMAT,
        "version": VERSION,
        "provenance": provenance(),
        "protocol": experiment.protocol.name,
        "source": experiment.source,
        "datasets": list(experiment.datasets),
        "methods": list(experiment.methods),
        "seeds": list(experiment.seeds),
        "all_classes": experiment.all_classes,
        "shots": list(experiment.shots),
        "config": {name: value for name, value in common if name not in by_cell},
        "cells": [
            {
                "dataset": outcome.cell.dataset,
                "method": outcome.cell.method,
                "seed": outcome.cell.seed,
                "shots": outcome.cell.shots,
                "status": outcome.status,
                "accuracy": outcome.accuracy,
                "train_seconds": outcome.train_seconds,
                "run_dir": outcome.cell.run_dir.relative_to(experiment.root).as_posix(),
                "error": outcome.error or None,
            }
            for outcome in outcomes
        ],
        "table": [asdict(entry) for entry in entries],
    }
