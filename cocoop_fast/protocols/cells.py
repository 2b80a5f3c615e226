"""The cells of an experiment: one method, trained on one data set with one seed, and what it is tested on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TypeVar, cast

from cocoop_fast.config import DataConfig, Method, RunConfig, load_yaml, to_mapping
from cocoop_fast.data import REGISTRY, Dataset
from cocoop_fast.errors import UserError
from cocoop_fast.methods.records import METHODS, has_context, knows_other_classes
from cocoop_fast.protocols.protocol import Protocol, in_shots
from cocoop_fast.runs.directory import check_same_run
from cocoop_fast.runs.recipe import resolve

_SHOWN = 5


@dataclass(frozen=True)
class Experiment:
    """What a user asks for.

    Args:
        protocol: the paper's setting.
        config: what all cells have in common; method, data set, classes, shots of a protocol that has several
            numbers of them, seed and directory are set by cell.
        data: where each data set is, by the name it has in tables and directories.
        datasets: names of those to test on, and to train on unless there is a source.
        methods, seeds: every one with every data set.
        root: of everything that is written.
        source: name of the data set that is trained on; ``None`` for base-to-new.
        all_classes: base-to-new models are also tested on base and new classes together.
        shots: training images a class, one cell each; empty: the configuration's.
    """

    protocol: Protocol
    config: RunConfig
    data: Mapping[str, DataConfig]
    datasets: tuple[str, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    root: Path
    source: str | None = None
    all_classes: bool = False
    shots: tuple[int, ...] = ()

    @property
    def trained_on(self) -> tuple[str, ...]:
        return self.datasets if self.source is None else (self.source,)


@dataclass(frozen=True)
class Cell:
    """One training run and its tests.

    Args:
        dataset: trained on.
        method, seed: of the run.
        config: of the run.
        tests: beyond those of the run itself, by name: images, and in ``subset`` of which classes. Their results are in
            test_<name>/ of the run directory.
        several_shots: whether the experiment has cells that differ in their shots alone.
    """

    dataset: str
    method: Method
    seed: int
    config: RunConfig
    tests: tuple[tuple[str, DataConfig], ...]

    several_shots: bool = False

    @property
    def run_dir(self) -> Path:
        return cast(Path, self.config.output_dir)

    @property
    def shots(self) -> int:
        """Training images a class; 0: all of them."""
        return self.config.data.shots

    def __str__(self) -> str:
        shots = f"{in_shots(self.shots)}, " if self.several_shots else ""
        return f"{self.dataset}, {self.method}, {shots}seed {self.seed}"


_Computed = TypeVar("_Computed", Experiment, Cell)


def make_cells(experiment: Experiment) -> tuple[Cell, ...]:
    """All cells, those of one data set together, so that its images are listed and encoded once.

    Run directories are ``<root>/<data set>/<method>/seed<N>``: seeds side by side, as the reference's result
    parser expects them. Where there are several numbers of shots, ``shots_<N>`` lies between method and seed; a method
    that learns from no image has cells of the first number alone.
    """
    source, config = experiment.source, experiment.config
    cells = []
    for dataset in experiment.trained_on:
        data = replace(experiment.data[dataset], subset=experiment.protocol.subset)
        if source is None:
            elsewhere = {"all": data} if experiment.all_classes else {}
        else:
            elsewhere = {name: experiment.data[name] for name in experiment.datasets if name != source}
        tests = tuple((name, replace(there, subset="all")) for name, there in elsewhere.items())
        for method in experiment.methods:
            numbers = experiment.shots if METHODS[method].learns else experiment.shots[:1]
            attributes = config.prompt.attributes if has_context(method) else ()
            for shots, seed in product(numbers or (None,), experiment.seeds):
                of_shots = "" if shots is None else f"shots_{shots}"
                own = replace(
                    config,
                    prompt=replace(config.prompt, method=method, attributes=attributes),
                    data=data if shots is None else replace(data, shots=shots),
                    seed=seed,
                    output_dir=experiment.root / dataset / method / of_shots / f"seed{seed}",
                )
                # A method that learns one context or weight a class has nothing to say about other classes.
                beyond = tests if knows_other_classes(own.prompt) else ()
                cells.append(Cell(dataset, method, seed, own, beyond, several_shots=bool(experiment.shots)))
    return tuple(cells)


def on_device(what: _Computed, device: str) -> _Computed:
    """The same experiment or cell, computed elsewhere."""
    return replace(what, config=replace(what.config, model=replace(what.config.model, device=device)))


def check_present(experiment: Experiment) -> None:
    """Find out before hours of training that the images of a data set are not there.

    Raises:
        UserError: naming every data set that is unknown or incomplete.
    """
    unknown = [data.name for data in experiment.data.values() if data.name not in REGISTRY]
    if unknown:
        raise UserError(
            f"There is no data set called {' or '.join(unknown)}; choose from {', '.join(REGISTRY)}, or name a "
            "folder of your own as NAME=PATH."
        )
    lacking = [
        f"{name} lacks {', '.join(missing[:2])}"
        for name, data in experiment.data.items()
        if (missing := REGISTRY[data.name].missing(data))
    ]
    if lacking:
        raise UserError(
            f"Not all data sets are there: {'; '.join(lacking)}. `cocoop-fast datasets` says what belongs where; "
            "--datasets names those to use, and --root where they are.",
            exit_status=1,
        )


def changed_cells(cells: Sequence[Cell], load: Callable[[DataConfig], Dataset]) -> dict[Cell, str]:
    """Cells whose run directory holds a run of another configuration, with what differs.

    Args:
        cells: those without a run directory cost nothing.
        load: lists the images of a data set, whose defaults are part of a run's configuration.
    """
    changed = {}
    for cell in cells:
        file = cell.run_dir / "config.yaml"
        if not file.exists():
            continue
        try:
            there = load_yaml(file)
            check_same_run(there, to_mapping(resolve(cell.config, load(cell.config.data))), cell.run_dir)
        except UserError as error:
            changed[cell] = str(error)
    return changed


def refuse_changed(changed: dict[Cell, str]) -> None:
    """Refuse to mix results of two configurations in one table.

    Raises:
        UserError: there are such cells.
    """
    if not changed:
        return
    names = [str(cell) for cell in changed]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    what = "1 cell was" if len(changed) == 1 else f"{len(changed)} cells were"
    first = next(iter(changed.values())).split("; ")[0]
    raise UserError(
        f"{what} trained with another configuration: {'; '.join(names[:_SHOWN])}{more} ({first}). Use another "
        "--output-dir, train these cells anew with --redo-changed, or all of them with --overwrite."
    )
