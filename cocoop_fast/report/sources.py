"""What a report is made from: directories of runs and of protocols, read without loading a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cocoop_fast.config import PromptConfig, RunConfig, flatten, from_mapping, load_yaml, to_mapping
from cocoop_fast.errors import UserError
from cocoop_fast.files.parsing import ParseError, json_value, refusing_damage
from cocoop_fast.protocols.outputs import FORMAT, VERSION
from cocoop_fast.protocols.protocol import find_protocol, in_shots
from cocoop_fast.protocols.table import BySeed, Entry, entries_of
from cocoop_fast.report.history import History, read_history
from cocoop_fast.report.words import SUBSETS
from cocoop_fast.variants import name_of, plain

_BESIDE = ("seed", "output_dir")  # what may differ between runs that are averaged
_DEEPEST = 3  # levels below a directory at which runs are looked for: DATA/METHOD/seedN


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
        """With what is added to it."""
        return name_of(self.config)

    @property
    def provenance(self) -> dict[str, Any]:
        """When, where, with what and by which command; empty for runs of versions that did not record it."""
        for record in (self.history.start, self.results or {}):
            if isinstance(found := record.get("provenance"), dict):
                return found
        return {}

    def classes_tested(self) -> dict[str, int]:
        """How many classes there are in each set that it was tested on, as far as that was recorded."""
        tested = (self.results or {}).get("evaluations", {})
        return {name: len(one["per_class_accuracy"]) for name, one in tested.items()}

    def short_classes(self) -> tuple[int, int] | None:
        """How many classes have fewer training images than were asked for, and how few the smallest has."""
        images, asked = self.history.start.get("class_images"), self.config.data.shots
        short = [one for one in images or () if asked and one < asked]
        return (len(short), min(short)) if short else None

    def accuracy(self) -> dict[str, float]:
        """Percent, by the classes tested on: "base", "new", "all"."""
        if self.results is None:
            return {}
        row = self.results["rows"][0]
        found = {name: row[name] for name in SUBSETS if row[name] is not None}
        for name, value in found.items():
            if type(value) not in (int, float) or not 0 <= value <= 100:
                raise TypeError(f"`{name}` is no percentage")
        return found

    def class_accuracy(self, subset: str, count: int) -> list[float | None] | None:
        """Percent, of each of ``count`` classes of a subset; ``None`` if it was not recorded."""
        tested = (self.results or {}).get("evaluations", {}).get(subset, {})
        recorded = tested.get("per_class_accuracy")
        return recorded if isinstance(recorded, list) and len(recorded) == count else None


@dataclass(frozen=True)
class Source:
    """Runs that are shown in one table.

    Args:
        title: over the table.
        entries: the numbers of the table, as in results.json.
        runs: those with a directory, finished or not.
        missing: a sentence for each result that is not there.
        setting: the model and the shots that all have in common, in words.
        focus: the method, as in labels, whose close-up is open when the page is.
    """

    title: str
    entries: tuple[Entry, ...]
    runs: tuple[Run, ...]
    missing: tuple[str, ...]
    setting: str
    focus: str


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
        is_run = (path / "config.yaml").is_file()
        if not is_run and (path / "results.json").is_file():
            sources.append(_read_protocol(path))
            continue
        levels = range(2 if is_run else _DEEPEST + 1)  # directly in a run lie those that it was compared with
        found = sorted(file.parent for level in levels for file in path.glob("*/" * level + "config.yaml"))
        if not found:
            raise UserError(
                f"{path} holds no run (no config.yaml) and no results of a protocol (no results.json); pass the "
                "output of a training run or of `run`."
            )
        loose |= {folder: _read_run(folder) for folder in found if folder not in loose}
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
    runs, missing = [], []
    with refusing_damage(file):
        for cell in results["cells"]:
            folder = path / cell["run_dir"]
            if not folder.resolve().is_relative_to(path):
                raise UserError(f"{file} names a run outside of its directory: {cell['run_dir']}.")
            run = None
            if (folder / "config.yaml").is_file():
                run = _read_run(folder, cell["dataset"], features=path / "features")
                if results.get("shots"):
                    run = replace(run, label=f"{run.label} ({in_shots(run.config.data.shots)})")
                runs.append(run)
            if cell["status"] != "finished":
                why = cell["error"] or ("not begun" if run is None else run.history.progress())
                shots = f"{in_shots(cell['shots'])}, " if results.get("shots") else ""
                name = f"{cell['dataset']}, {cell['method']}, {shots}seed {cell['seed']}"
                missing.append(f"{name}: {why.rstrip('.')}.")
        return Source(
            title=find_protocol(results["protocol"]).title,
            entries=tuple(Entry.from_mapping(entry) for entry in results["table"]),
            runs=tuple(runs),
            missing=tuple(missing),
            setting=_setting(results["config"], results.get("shots") or ()),
            focus=_focus([run.method for run in runs]),
        )


def _read_run(path: Path, dataset: str | None = None, features: Path | None = None) -> Run:
    """A run directory; images in a folder of one's own go by the name of the folder if no other is given."""
    config = from_mapping(load_yaml(path / "config.yaml"), where=str(path / "config.yaml"))
    own = config.data.root.name if config.data.name == "folder" and config.data.root else config.data.name
    file, log = path / "results.json", path / "metrics.jsonl"
    with refusing_damage(log):
        history = read_history(log)
    run = Run(
        path=path,
        dataset=dataset or own,
        label=name_of(config),
        config=config,
        results=_read_json(file) if file.is_file() else None,
        history=history,
        features=features,
    )
    with refusing_damage(file):
        run.accuracy()
        run.classes_tested()
    with refusing_damage(log):
        run.short_classes()
    return run


def _source_of_runs(runs: Sequence[Run]) -> Source:
    """Runs that differ in their seed alone are averaged; others get a row each."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        key: Any = (run.dataset, _decides(run.config))
        if any(run.config.seed == other.config.seed for other in groups.get(key, ())):
            key = run.path  # the same again: both are shown
        groups.setdefault(key, []).append(run)
    labelled = [_labelled(group, runs) for group in groups.values()]
    runs = [run for group in labelled for run in group]
    settings = dict.fromkeys(_setting(dict(flatten(to_mapping(run.config)))) for run in runs)
    return Source(
        title="Accuracy by the classes tested on",
        entries=tuple(entry for group in labelled for entry in _entries(group)),
        runs=tuple(runs),
        missing=tuple(f"{run.path}: {run.history.progress()}." for run in runs if run.results is None),
        setting="; ".join(settings),
        focus=runs[0].label,  # of the directory that was named; what it was compared with lies below it
    )


def _entries(group: Sequence[Run]) -> list[Entry]:
    """The numbers of runs that differ in their seed alone, as a protocol's table has them."""
    one = group[0]
    accuracy: dict[str, BySeed] = {}
    for run in group:
        for metric, value in run.accuracy().items():
            accuracy.setdefault(metric, {})[run.config.seed] = value
    # What was trained on other classes than the paper's is not the paper's experiment.
    protocol = "base2new" if one.config.data.subset == "base" else None
    return [
        replace(entry, method=one.label) for entry in entries_of(one.dataset, one.method, accuracy, protocol)
    ]


def _labelled(group: Sequence[Run], runs: Sequence[Run]) -> list[Run]:
    """The same with what sets them apart from other runs of their method on the same data."""
    one = group[0]
    alike = [run for run in runs if (run.dataset, run.method) == (one.dataset, one.method)]
    theirs = [dict(_decides(run.config)) for run in alike]
    different = [
        f"{name.rsplit('.', 1)[-1]} {value}"
        for name, value in _decides(one.config)
        if any(fields.get(name) != value for fields in theirs)
    ]
    if not different and len(alike) > len(group):
        different = [str(one.path)]
    label = f"{one.method} ({', '.join(different)})" if different else one.method
    return [replace(run, label=label) for run in group]


def _focus(methods: Sequence[str]) -> str:
    """Of a protocol, which has no method of its own: CoCoOp, or else the last, since tables begin with zero-shot CLIP."""
    own = PromptConfig().method
    return next((name for name in methods if plain(name) == own), methods[-1] if methods else own)


def _decides(config: RunConfig) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in flatten(to_mapping(config)) if name not in _BESIDE)


def _setting(config: Mapping[str, Any], shots: Sequence[int] = ()) -> str:
    model = " ".join(filter(None, (config["model.name"], config["model.pretrained"])))
    number = ", ".join(map(str, shots)) or config["data.shots"] or "all"
    return f"{model}, {number} training images a class"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json_value(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of the parser, or no UTF-8
        reason = error if isinstance(error, ParseError) else "it is not UTF-8 text"
        raise UserError(f"{path} is damaged ({reason}); run the command that wrote it again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds no fields); run the command that wrote it again.")
    return found
