"""Small experiments of two data sets, and outcomes made by hand."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_runs import tiny_config, write_images

from cocoop_fast.config import DataConfig
from cocoop_fast.evaluation.feature_cache import FeatureCache
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.protocols.cells import Cell, Experiment, make_cells
from cocoop_fast.protocols.protocol import PROTOCOLS
from cocoop_fast.protocols.run_cell import Outcome, run_cells
from cocoop_fast.training.observer import Observer, RunInfo


def folders(tmp_path: Path, *names: str) -> dict[str, DataConfig]:
    """Data sets of four classes with nine images each, in folders of these names."""
    for name in names:
        for seed, class_name in enumerate("abcd"):
            if not (tmp_path / name / class_name).exists():
                write_images(tmp_path / name / class_name, 9, seed + 10 * len(name))
    return {name: DataConfig(name="folder", root=tmp_path / name, shots=2) for name in names}


def small_experiment(tmp_path: Path, protocol: str = "base2new", **fields: Any) -> Experiment:
    """Digits alone if no data are named; two shots, two epochs."""
    data = fields.pop("data", {"digits": DataConfig(shots=2)})
    source = fields.get("source")
    config = replace(tiny_config(tmp_path, **fields.pop("config", {})), output_dir=None)
    values: dict[str, Any] = {
        "datasets": tuple(name for name in data if name != source),
        "methods": ("zeroshot", "cocoop"),
        "seeds": (1, 2),
        "root": tmp_path / "out",
        **fields,
    }
    return Experiment(protocol=PROTOCOLS[protocol], config=config, data=data, **values)


def run_all(
    experiment: Experiment, observer: Observer | None = None, overwrite: frozenset[Cell] = frozenset()
) -> list[Outcome]:
    """As a process of its own would: nothing is shared with an earlier call but files."""
    observer = observer or Observer()
    shared = Shared(FeatureCache(experiment.root / "features", observer.on_message))
    return list(run_cells(make_cells(experiment), shared, observer, overwrite=overwrite))


def finished(cell: Cell, **accuracy: float) -> Outcome:
    """An outcome with these accuracies; ``_`` in a name stands for itself."""
    return Outcome(cell, "finished", accuracy, 1.5)


class Accident(Observer):
    """Seed 2 kills its process, seed 3 fails; for processes elsewhere."""

    def on_run_start(self, info: RunInfo) -> None:
        if info.config.seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if info.config.seed == 3:
            raise RuntimeError("broken")
