"""What a report is made from: directories of runs and of protocols, read without loading a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cocoop_fast.config import RunConfig, flatten, from_mapping, load_yaml, to_mapping
from cocoop_fast.errors import UserError
from cocoop_fast.protocols.cells import Cell, Experiment
from cocoop_fast.protocols.outputs import FORMAT, VERSION
from cocoop_fast.protocols.protocol import PROTOCOLS, find_protocol
from cocoop_fast.protocols.published import Published
from cocoop_fast.protocols.run_cell import Outcome
from cocoop_fast.protocols.table import Entry, make_table
from cocoop_fast.report.history import History, read_history

_T = TypeVar("_T")
_BESIDE = ("seed", "output_dir")  # what may differ between runs that are averaged
_DEEPEST = 3  # levels below a directory at which runs are looked for: DATA/METHOD/seedN
_METRICS = ("base", "new", "all")


@dataclass(frozen=True)
class Run:
    """One run directory.

    Args:
        path: the directory.
        dataset: trained on, by the name it has in tables.
        label: the method, with what sets it apart from others of the same method.
        config: as it was resolved.
        results: what its results.json holds; ``None`` while it is not finished.
        history: of its training.
        features: where a protocol keeps the features of test images; ``None`` for a run of its own.
    """

    path: Path
    dataset: str
    label: str
    config: RunConfig
    results: dict[str, Any] | None
    history: History
    features: Path | None = None

    @property
    def method(self) -> str:
        return self.config.prompt.method

    def accuracy(self) -> dict[str, float]:
        """Percent, by the classes tested on: "base", "new", "all"."""
        if self.results is None:
            return {}
        row = self.results["rows"][0]
        return {name: row[name] for name in _METRICS if row[name] is not None}


@dataclass(frozen=True)
class Source:
    """Runs that are shown in one table.

    Args:
        title: over the table.
        entries: the numbers of the table, as in results.json.
        runs: those with a directory, finished or not.
        missing: a sentence for each result that is not there.
        setting: the model and the shots that all have in common, in words.
    """

    title: str
    entries: tuple[Entry, ...]
    runs: tuple[Run, ...]
    missing: tuple[str, ...]
    setting: str


def read_sources(paths: Sequence[Path]) -> tuple[Source, ...]:
    """A source for each protocol's directory, and one for all other runs together.

    Args:
        paths: run directories, output directories of protocols, or directories above runs.

    Raises:
        UserError: no run there, or files that are damaged.
    """
    sources = []
    loose: dict[Path, Run] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        if not path.is_dir():
            raise UserError(f"There is no directory {path}; pass the output of a training run or of `run`.")
        if (path / "config.yaml").is_file():
            found = [path, *sorted(file.parent for file in path.glob("*/config.yaml"))]
        elif (path / "results.json").is_file():
            sources.append(_read_protocol(path))
            continue
        else:
            below = [
                file for depth in range(_DEEPEST) for file in path.glob("*/" * (depth + 1) + "config.yaml")
            ]
            found = sorted(file.parent for file in below)
            if not found:
                raise UserError(
                    f"{path} holds no run (no config.yaml) and no results of a protocol (no results.json); pass the "
                    "output of a training run or of `run`."
                )
        loose.update({run: _read_run(run, _own_name(run)) for run in found if run not in loose})
    if loose:
        sources.append(_source_of_runs(list(loose.values())))
    return tuple(sources)


def _read_protocol(path: Path) -> Source:
    file = path / "results.json"
    results = _read_json(file)
    if results.get("format") != FORMAT:
        raise UserError(
            f"{file} holds no results of a protocol; pass the output of a training run or of `run`."
        )
    if results.get("version") != VERSION:
        raise UserError(
            f"{file} has format {results.get('version')}, and this version of cocoop_fast reads format {VERSION}; "
            "use the version that wrote it."
        )
    return _whole(file, lambda: _protocol_source(path, results))


def _protocol_source(path: Path, results: dict[str, Any]) -> Source:
    runs = []
    missing = []
    for cell in results["cells"]:
        folder = path / cell["run_dir"]
        if not folder.resolve().is_relative_to(path):
            raise UserError(
                f"{path / 'results.json'} names a run outside of its directory: {cell['run_dir']}."
            )
        run = None
        if (folder / "config.yaml").is_file():
            run = _read_run(folder, cell["dataset"], features=path / "features")
            runs.append(run)
        if cell["status"] != "finished":
            name = f"{cell['dataset']}, {cell['method']}, seed {cell['seed']}"
            why = cell["error"] or ("not begun" if run is None else run.history.progress())
            missing.append(f"{name}: {why.rstrip('.')}.")
    config = results["config"]
    entries = tuple(
        Entry(
            dataset=entry["dataset"],
            method=entry["method"],
            metric=entry["metric"],
            mean=entry["mean"],
            std=entry["std"],
            seeds={int(seed): value for seed, value in entry["seeds"].items()},
            published=None if entry["published"] is None else Published(**entry["published"]),
        )
        for entry in results["table"]
    )
    return Source(
        title=find_protocol(results["protocol"]).title,
        entries=entries,
        runs=tuple(runs),
        missing=tuple(missing),
        setting=_setting(config["model.name"], config["model.pretrained"], config["data.shots"]),
    )


def _read_run(path: Path, dataset: str | None = None, features: Path | None = None) -> Run:
    config = from_mapping(load_yaml(path / "config.yaml"), where=str(path / "config.yaml"))
    results = None
    file = path / "results.json"
    if file.is_file():
        results = _read_json(file)
    run = Run(
        path=path,
        dataset=dataset or config.data.name,
        label=config.prompt.method,
        config=config,
        results=results,
        history=_whole(path / "metrics.jsonl", lambda: read_history(path / "metrics.jsonl")),
        features=features,
    )
    _whole(file, run.accuracy)
    return run


def _own_name(path: Path) -> str | None:
    """Images in a folder of one's own go by the name of the folder."""
    data = load_yaml(path / "config.yaml").get("data", {})
    root = data.get("root") if isinstance(data, dict) else None
    return Path(root).name if root and data.get("name") == "folder" else None


def _source_of_runs(runs: list[Run]) -> Source:
    """Runs that differ in their seed alone are averaged; others get a row each."""
    groups: dict[Any, dict[int, Run]] = {}
    for run in runs:
        key: Any = (run.dataset, _decides(run.config))
        if run.config.seed in groups.get(key, {}):
            key = (*key, run.path)  # the same again: both are shown
        groups.setdefault(key, {})[run.config.seed] = run
    labelled = [_labelled(list(group.values()), runs) for group in groups.values()]
    runs = [run for group in labelled for run in group]
    settings = dict.fromkeys(
        _setting(run.config.model.name, run.config.model.pretrained, run.config.data.shots) for run in runs
    )
    return Source(
        title="Accuracy by the classes tested on",
        entries=tuple(entry for group in labelled for entry in _entries(group)),
        runs=tuple(runs),
        missing=tuple(f"{run.path}: {run.history.progress()}." for run in runs if run.results is None),
        setting="; ".join(settings),
    )


def _entries(group: list[Run]) -> list[Entry]:
    """The numbers of runs that differ in their seed alone, as a protocol's table has them."""
    one = group[0]
    outcomes = [
        Outcome(
            Cell(run.dataset, run.config.prompt.method, run.config.seed, run.config, ()),
            "finished",
            run.accuracy(),
        )
        for run in group
        if run.results is not None
    ]
    experiment = Experiment(
        protocol=PROTOCOLS["base2new"],
        config=one.config,
        data={},
        datasets=(one.dataset,),
        methods=(one.config.prompt.method,),
        seeds=tuple(run.config.seed for run in group),
        root=one.path,
    )
    # What was trained on other classes than the paper's is not the paper's experiment.
    as_published = one.config.data.subset == "base"
    return [
        replace(entry, method=one.label, published=entry.published if as_published else None)
        for entry in make_table(experiment, outcomes)
    ]


def _labelled(group: list[Run], runs: list[Run]) -> list[Run]:
    """The same with what sets them apart from other runs of their method on the same data."""
    one = group[0]
    others = [
        run for run in runs if run not in group and (run.dataset, run.method) == (one.dataset, one.method)
    ]
    own = _decides(one.config)
    different = [
        f"{name.rsplit('.', 1)[-1]} {value}"
        for name, value in own
        if any(dict(_decides(other.config)).get(name) != value for other in others)
    ]
    if others and not different:
        different = [str(one.path)]
    label = f"{one.method} ({', '.join(different)})" if different else one.method
    return [replace(run, label=label) for run in group]


def _decides(config: RunConfig) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in flatten(to_mapping(config)) if name not in _BESIDE)


def _setting(model: str, pretrained: str | None, shots: int) -> str:
    return f"{' '.join(filter(None, (model, pretrained)))}, {shots or 'all'} training images a class"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(
            f"{path} is damaged (it is not JSON); run the command that wrote it again."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds no fields); run the command that wrote it again.")
    return found


def _whole(path: Path, read: Callable[[], _T]) -> _T:
    """What ``read`` makes of a file, if nothing is missing in it."""
    try:
        return read()
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run the command that wrote it again.") from error
