"""A whole experiment: train on one set of classes, evaluate on base and new ones, compare methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoop_fast.config import Method, RunConfig
from cocoop_fast.evaluation.metrics import Metrics
from cocoop_fast.training.observer import Observer


@dataclass(frozen=True)
class Row:
    """One method's result. Accuracies are percentages; those that were not asked for are ``None``."""

    method: str
    seed: int
    base: float | None
    new: float | None
    h: float | None  # harmonic mean of base and new
    all: float | None
    output_dir: Path

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.__dict__, "output_dir": str(self.output_dir)}


@dataclass(frozen=True)
class Results:
    """Rows in the order in which the methods ran: the configured one first."""

    rows: tuple[Row, ...]
    output_dir: Path


def run(
    config: RunConfig,
    *,
    compare: tuple[Method, ...] = (),
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Results:
    """Train ``config``'s method, evaluate it, and do the same for the methods in ``compare``.

    With ``data.subset`` "base" the model is trained on the first half of the classes and evaluated on both
    halves (the paper's section 4.1); with "new" or "all" it is trained and evaluated on those classes. Every
    compared method has its own recipe and lives in ``output_dir/<method>``. A directory that holds an
    unfinished run of the same configuration is resumed; a finished one is read, not trained again.

    Args:
        config: as read by :mod:`cocoop_fast.config`; fields that are ``None`` are resolved here.
        compare: further methods; the configured one is left out if named again.
        observer: is told about progress.
        overwrite: discard what the output directory holds.

    Raises:
        UserError: anything wrong with the configuration, the data, or the output directory.
    """
    raise NotImplementedError


def evaluate_run(
    run_dir: Path,
    *,
    subset: str | None = None,
    reference_checkpoint: Path | None = None,
    observer: Observer | None = None,
) -> dict[str, Metrics]:
    """Evaluate a finished run again.

    Args:
        run_dir: what :func:`run` wrote.
        subset: "base", "new" or "all"; ``None``: those the run itself is evaluated on.
        reference_checkpoint: learned parameters from the reference implementation
            (``model.pth.tar-N`` or its folder) instead of the run's own.

    Returns:
        Metrics by subset.
    """
    raise NotImplementedError
