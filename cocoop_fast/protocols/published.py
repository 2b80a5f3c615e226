"""The paper's numbers, from ``assets/published_results.json``: to be shown beside ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_FILE = Path(__file__).parents[1] / "assets" / "published_results.json"


@dataclass(frozen=True)
class Published:
    """One published number.

    Args:
        value: percent, two decimals.
        source: where it stands, and what it was checked against.
        checked: whether it agrees with a published sum, so that a wrong digit is unlikely.
    """

    value: float
    source: str
    checked: bool


@lru_cache(maxsize=1)
def published_results() -> dict[tuple[str, str, str, str], Published]:
    """All numbers by (protocol, data set or "average", method, metric).

    Metrics are "base", "new", "h" and "all" for base-to-new, "accuracy" for the others.
    """
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    return {
        (row["protocol"], row["dataset"], row["method"], metric): Published(
            value, content["sources"][row["source"]], row["checked"]
        )
        for row in content["rows"]
        for metric, value in row["values"].items()
    }


def published_setting() -> str:
    """Model, shots and seeds of these numbers, in words."""
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    return f"{content['paper']}; {content['setting']}"
