"""What `pytest benchmarks/ --benchmark-only` measures unless `--full` is given, and the table that a session ends with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoop_fast.readable import readable_seconds

# A training step for 100 classes and one image, in minutes rather than a quarter of an hour.
CONTESTANTS = ("engine", "floor", "tree+torch", "padding-free", "truncated+compile", "dense")
NAMES = tuple(f"test_step[{name}-k100-b1]" for name in CONTESTANTS)
WIDEST = 100


def is_whole(arguments: Sequence[str], keyword: str) -> bool:
    """Whether a call names folders only: who names a file, a test or a keyword knows what to measure."""
    return not keyword and all("::" not in one and Path(one).is_dir() for one in arguments)


def table(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of at most :data:`WIDEST` columns.

    Args:
        records: the `extra_info` of what was measured; those without a contestant and its time are passed over.
    """
    timed = [one for one in records if "best_seconds" in one]
    if not timed:
        return []
    dense = {_problem(one): one["best_seconds"] for one in timed if one["contestant"] == "dense"}
    rows = [("", "rows", "best", "x floor", "dense takes")]
    for one in timed:
        seconds, slowest = one["best_seconds"], dense.get(_problem(one))
        rows.append(
            (
                f"{one['action']}, {one['classes']} classes, batch {one['batch']}: {one['contestant']}",
                f"{one['rows']:,}",
                readable_seconds(seconds),
                f"{one['ratio_to_floor']:.2f}",
                "-" if slowest is None else f"{slowest / seconds:.1f} x",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _problem(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["action"], record["classes"], record["batch"]
