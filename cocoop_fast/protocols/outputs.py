"""What an experiment leaves in its directory: results.json, table.csv and table.md (docs/protocols.md)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cocoop_fast.config import flatten, to_mapping
from cocoop_fast.files.atomic import write_atomically, write_json
from cocoop_fast.protocols.cells import Experiment
from cocoop_fast.protocols.published import published_setting
from cocoop_fast.protocols.run_cell import Outcome
from cocoop_fast.protocols.table import Entry, make_table, shown

FORMAT, VERSION = "cocoop_fast protocol results", 1
UNCHECKED = "†"
NOTHING = "-"
_TITLES = {"base": "Base", "new": "New", "h": "H", "all": "All", "accuracy": "Accuracy"}


def write_outputs(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Write the three files, each whole or not at all. Returns what results.json holds."""
    entries = make_table(experiment, outcomes)
    results = _mapping(experiment, outcomes, entries)
    experiment.root.mkdir(parents=True, exist_ok=True)
    write_json(experiment.root / "results.json", results)
    _write_text(experiment.root / "table.csv", _csv(entries))
    _write_text(experiment.root / "table.md", markdown(experiment, outcomes))
    return results


def columns_and_rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """The table as text: a row for each data set and method, and the paper's numbers in a row below it."""
    metrics = [name for name in _TITLES if any(entry.metric == name for entry in entries)]
    by_row: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in entries:
        by_row.setdefault((entry.dataset, entry.method), {})[entry.metric] = entry
    rows = []
    for (dataset, method), cells in by_row.items():
        ours = [shown(cells[name].mean, cells[name].std) if name in cells else NOTHING for name in metrics]
        rows.append([dataset, method, *ours])
        paper = [_published(cells.get(name)) for name in metrics]
        if set(paper) != {NOTHING}:
            rows.append(["", f"{method}, paper", *paper])
    return ["Data set", "Method", *(_TITLES[name] for name in metrics)], rows


def notes(experiment: Experiment, outcomes: Sequence[Outcome], entries: Sequence[Entry]) -> list[str]:
    """What a reader must know to compare the numbers, a line each."""
    seeds = ", ".join(str(seed) for seed in experiment.seeds)
    lines = [f"Accuracy in percent: mean ± standard deviation over seeds {seeds}."]
    if len(experiment.seeds) == 1:
        lines = [f"Accuracy in percent, seed {seeds}."]
    if any(entry.metric == "h" for entry in entries):
        lines.append("H: harmonic mean of the mean base and new accuracies.")
    numbers = [entry.published for entry in entries if entry.published]
    if numbers:
        lines.append(f"Paper: {published_setting()}.")
    if any(not number.checked for number in numbers):
        lines.append(
            f"{UNCHECKED} not checked against a second source or a sum: look it up before quoting it."
        )
    missing = [outcome for outcome in outcomes if outcome.status != "finished"]
    if missing:
        lines.append(f"{len(missing)} of {len(outcomes)} cells are missing.")
    return lines


def markdown(experiment: Experiment, outcomes: Sequence[Outcome]) -> str:
    """The table with its title and notes."""
    entries = make_table(experiment, outcomes)
    columns, rows = columns_and_rows(entries)
    lines = [f"# {experiment.protocol.title}", ""]
    if rows:
        lines += [
            "| " + " | ".join(row) + " |" for row in [columns, ["---", "---"] + ["---:"] * (len(columns) - 2)]
        ]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    config = experiment.config
    model = " ".join(filter(None, (config.model.name, config.model.pretrained)))
    lines.append(f"- Model {model}, {config.data.shots or 'all'} shots.")
    lines += [f"- {note}" for note in notes(experiment, outcomes, entries)]
    return "\n".join(lines) + "\n"


def _published(entry: Entry | None) -> str:
    if entry is None or entry.published is None:
        return NOTHING
    return f"{entry.published.value:.2f}" + ("" if entry.published.checked else UNCHECKED)


def _csv(entries: Sequence[Entry]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "method", "metric", "mean", "std", "n", "published", "published_checked"])
    for entry in entries:
        number = entry.published
        paper = (number.value, number.checked) if number else ("", "")
        std = "" if entry.std is None else entry.std
        writer.writerow(
            [entry.dataset, entry.method, entry.metric, entry.mean, std, len(entry.seeds), *paper]
        )
    return text.getvalue()


def _mapping(experiment: Experiment, outcomes: Sequence[Outcome], entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "protocol": experiment.protocol.name,
        "source": experiment.source,
        "datasets": list(experiment.datasets),
        "methods": list(experiment.methods),
        "seeds": list(experiment.seeds),
        "all_classes": experiment.all_classes,
        "config": _common(experiment),
        "cells": [
            {
                "dataset": outcome.cell.dataset,
                "method": outcome.cell.method,
                "seed": outcome.cell.seed,
                "status": outcome.status,
                "accuracy": outcome.accuracy or {},
                "train_seconds": outcome.train_seconds,
                "run_dir": outcome.cell.run_dir.relative_to(experiment.root).as_posix(),
                "error": outcome.error or None,
            }
            for outcome in outcomes
        ],
        "table": [
            {
                "dataset": entry.dataset,
                "method": entry.method,
                "metric": entry.metric,
                "mean": entry.mean,
                "std": entry.std,
                "seeds": {str(seed): value for seed, value in entry.seeds.items()},
                "published": None if entry.published is None else entry.published.__dict__,
            }
            for entry in entries
        ],
    }


def _common(experiment: Experiment) -> dict[str, Any]:
    """The configuration without what is decided cell by cell."""
    by_cell = {"seed", "output_dir", "prompt.method", "data.name", "data.root", "data.subset"}
    fields = flatten(to_mapping(experiment.config))
    return {name: value for name, value in fields if name not in by_cell}


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
