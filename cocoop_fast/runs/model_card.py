"""What a run says of itself on the card of what it learned."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.config import ResolvedConfig
from cocoop_fast.readable import listed
from cocoop_fast.runs.checkpoint import Checkpoint
from cocoop_fast.runs.directory import RunDirectory
from cocoop_fast.runs.recipe import in_words


def about_run(run_dir: Path, config: ResolvedConfig, newest: Checkpoint) -> str:
    """Results, data and recipe of a run, in Markdown."""
    results = RunDirectory(run_dir).results()
    evaluations = (results or {}).get("evaluations") or {}
    lines = ["## Results", ""]
    if evaluations:
        lines += ["| classes | images | accuracy | macro F1 |", "|---|---|---|---|"]
        lines += [
            f"| {subset} | {one['total']:,} | {one['accuracy']:.1f} % | {one['macro_f1']:.1f} % |"
            for subset, one in evaluations.items()
        ]
        lines += ["", f"Of one run, with seed {config.seed}."]
    else:
        lines.append("The run was not finished, and there are none.")
    lines += [
        "",
        "## Data and training",
        "",
        f"{in_words(config)}; seed {config.seed}; {newest.step:,} steps.",
    ]
    if newest.other_classes:
        lines.append(
            f"Not trained on: {len(newest.other_classes):,} classes ({listed(newest.other_classes)})."
        )
    return "\n".join(lines)
