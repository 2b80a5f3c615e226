"""The paper's numbers, from ``assets/published_results.json``: to be shown beside ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

UNCHECKED = "†"


@dataclass(frozen=True)
class Published:
    """One published number; as text ``71.69``, or ``76.18†`` if nothing checks it.

    Args:
        value: percent, two decimals.
        source: where it stands, and what it was checked against.
        checked: whether it agrees with a published sum, so that a wrong digit is unlikely.
    """

    value: float
    source: str
    checked: bool

    def __str__(self) -> str:
        return f"{self.value:.2f}{'' if self.checked else UNCHECKED}"


@cache
def _content() -> dict[str, Any]:
    file = Path(__file__).parents[1] / "assets" / "published_results.json"
    return json.loads(file.read_text(encoding="utf-8"))


@cache
def published_results() -> dict[tuple[str, str, str, str], Published]:
    """All numbers by (protocol, data set or "average", method, metric).

    Metrics are "base", "new", "h" and "all" for base-to-new, "accuracy" for the others.
    """
    return {
        (row["protocol"], row["dataset"], row["method"], metric): Published(
            value, _content()["sources"][row["source"]], row["checked"]
        )
        for row in _content()["rows"]
        for metric, value in row["values"].items()
    }


def published_setting() -> str:
    """Model, shots and seeds of these numbers, in words."""
    return f"{_content()['paper']}; {_content()['setting']}"
