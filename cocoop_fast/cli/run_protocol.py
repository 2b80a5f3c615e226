"""``cocoop-fast run``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoop_fast.cli import configuration, output
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.config import DataConfig
    from cocoop_fast.protocols.cells import Cell, Experiment
    from cocoop_fast.protocols.run_cell import Outcome

EPILOG = """
[bold]Examples[/bold]

Table 1 on the embedded digits: [cyan]cocoop-fast run base2new --seeds 1 2 3[/cyan]

Table 1 on the paper's data sets: [cyan]cocoop-fast run base2new --root DATA --model ViT-B/16 --seeds 1 2 3[/cyan]

Table 2 with folders of your own: [cyan]cocoop-fast run cross-dataset --source a=photos/a --datasets b=photos/b c=photos/c --model ViT-B/16[/cyan]
"""

DEMO = "digits"  # the images that are always there
LISTS = ("--datasets", "--methods", "--seeds", "--devices")  # options that take several values

WHAT, RECIPE, MACHINE, SHOWN = "What is run", "Recipe", "Machine", "Output"


def option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    """An option whose help says its default."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


# Shared with `sweep`, which runs the same cells elsewhere.
ProtocolName = Annotated[
    str, typer.Argument(metavar="PROTOCOL", help="base2new, cross-dataset or domain-generalization.")
]
Pairs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY VALUE", help="Any other field of every cell, e.g. optim.epochs 5.", show_default=False
    ),
]
ConfigFiles = Annotated[
    list[Path] | None, option(WHAT, "--config", "-c", help="YAML file for every cell; may be repeated.")
]
Datasets = Annotated[
    str | None,
    option(
        WHAT,
        "--datasets",
        metavar="NAME ...",
        help="Of `cocoop-fast datasets`, or NAME=PATH for your own. Default: the paper's; without --root, digits.",
    ),
]
Methods = Annotated[
    str | None,
    option(WHAT, "--methods", metavar="METHOD ...", help="Default: zeroshot coop cocoop, the paper's."),
]
Seeds = Annotated[str | None, option(WHAT, "--seeds", metavar="N ...", help="Default: 1 2 3.")]
Source = Annotated[
    str | None,
    option(WHAT, "--source", help="Data set to train on; not for base2new. Default: imagenet, the paper's."),
]
AllClasses = Annotated[
    bool, option(WHAT, "--all-classes", help="base2new: test on base and new classes together, too.")
]
Root = Annotated[Path | None, option(WHAT, "--root", help="Folder of the data sets.")]
Shots = Annotated[int | None, option(WHAT, "--shots", help="Training images a class. Default: 16.")]
Model = Annotated[
    str | None, option(WHAT, "--model", help="open_clip architecture, or OpenAI's name. Default: demo.")
]
Pretrained = Annotated[
    str | None, option(WHAT, "--pretrained", help="open_clip tag of the weights, or a local file.")
]
Precision = Annotated[
    str | None, option(MACHINE, "--precision", metavar="auto|fp32|fp16|bf16|amp", help="Default: auto.")
]
Workers = Annotated[
    int | None, option(MACHINE, "--workers", "-w", help="Processes that read images. Default: 0.")
]
OutputDir = Annotated[
    Path | None, option(SHOWN, "--output-dir", "-o", help="Of cells and tables. Default: output/PROTOCOL.")
]
Overwrite = Annotated[bool, option(SHOWN, "--overwrite", help="Train all cells anew.")]
RedoChanged = Annotated[
    bool,
    option(SHOWN, "--redo-changed", help="Train those cells anew that were trained with other settings."),
]
Json = Annotated[
    bool, option(SHOWN, "--json", help="Print results.json on one line of stdout, and nothing else.")
]
Quiet = Annotated[bool, option(SHOWN, "--quiet", "-q", help="No progress; only the table.")]


def command(
    protocol: ProtocolName,
    pairs: Pairs = None,
    config: ConfigFiles = None,
    datasets: Datasets = None,
    methods: Methods = None,
    seeds: Seeds = None,
    source: Source = None,
    all_classes: AllClasses = False,
    root: Root = None,
    shots: Shots = None,
    model: Model = None,
    pretrained: Pretrained = None,
    precision: Precision = None,
    device: Annotated[
        str | None, option(MACHINE, "--device", help="auto, cpu, cuda or cuda:N. Default: auto.")
    ] = None,
    workers: Workers = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    redo_changed: RedoChanged = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run one of the paper's experiments: every method on every data set with every seed, then the table.

    Stopped at any moment, the same command goes on: finished cells are read, a half-trained one resumes from its
    checkpoint. Features of test images are computed once for all methods and seeds.
    """
    asked = build_experiment(
        protocol,
        datasets=datasets,
        methods=methods,
        seeds=seeds,
        source=source,
        all_classes=all_classes,
        output_dir=output_dir,
        files=config or (),
        options={
            "data.root": ("--root", root),
            "data.shots": ("--shots", shots),
            "model.name": ("--model", model),
            "model.pretrained": ("--pretrained", pretrained),
            "model.precision": ("--precision", precision),
            "model.device": ("--device", device),
            "data.workers": ("--workers", workers),
        },
        pairs=pairs or (),
    )

    from cocoop_fast.cli.progress import observe
    from cocoop_fast.evaluation.feature_cache import FeatureCache
    from cocoop_fast.experiments.shared import Shared
    from cocoop_fast.protocols.cells import make_cells
    from cocoop_fast.protocols.run_cell import run_cells

    cells = make_cells(asked)
    with output.only_json(json), observe(quiet=quiet) as observer:
        shared = Shared(FeatureCache(asked.root / "features", observer.on_message))
        anew = cells_to_redo(asked, cells, shared, overwrite=overwrite, redo_changed=redo_changed)
        shared.clip(asked.config.model)  # what is wrong with it is wrong for every cell
        outcomes = collect(asked, cells, run_cells(cells, shared, observer, overwrite=anew))
    finish(asked, outcomes, json=json)


def build_experiment(
    protocol_name: str,
    *,
    datasets: str | None,
    methods: str | None,
    seeds: str | None,
    source: str | None,
    all_classes: bool,
    output_dir: Path | None,
    files: Sequence[Path],
    options: dict[str, tuple[str, Any]],
    pairs: Sequence[str],
) -> Experiment:
    """What the options of ``run`` and ``sweep`` ask for.

    Raises:
        UserError: an unknown protocol, data set, method or field, a seed that is no number, missing images.
    """
    from cocoop_fast.protocols.cells import Experiment, check_present
    from cocoop_fast.protocols.protocol import PROTOCOLS, find_protocol

    protocol = find_protocol(protocol_name)
    built = configuration.build(files=files, options=options, pairs=pairs)
    output.warn(built.warnings)
    data = built.config.data
    if data.root is not None and data.name == "folder":
        data = replace(data, name=DEMO)  # a root alone implies a folder of classes; here it holds data sets
    decided = {"data.subset", "seed", "prompt.method", "output_dir"} & built.said
    decided |= {"data.name"} if data.name != DEMO else set()
    for field in sorted(decided):
        raise UserError(f"`{field}` is decided cell by cell; use the options of `cocoop-fast run --help`.")
    if all_classes and protocol.source is not None:
        raise UserError(
            f"--all-classes is for {next(iter(PROTOCOLS))}, where models know half of the classes."
        )
    if source is not None and protocol.source is None:
        raise UserError(f"--source is not for {protocol.name}, which trains on each data set.")

    trained_on = None
    places: dict[str, DataConfig] = {}
    if protocol.source is not None:
        trained_on = _place(source or protocol.source, data, places, "--source")
    names = _names(datasets, "--datasets")
    if names is None:
        names = [DEMO] if data.root is None and trained_on is None else list(protocol.datasets)
    tested_on = [_place(name, data, places, "--datasets") for name in names]
    experiment = Experiment(
        protocol=protocol,
        config=built.config,
        data=places,
        datasets=tuple(name for name in dict.fromkeys(tested_on) if name != trained_on),
        methods=tuple(_methods(methods)),  # type: ignore[arg-type]  # checked there
        seeds=tuple(_seeds(seeds)),
        root=output_dir or Path("output") / protocol.name,
        source=trained_on,
        all_classes=all_classes,
    )
    if not experiment.datasets:
        raise UserError(f"--datasets names only {trained_on}, the source; name others to test on.")
    check_present(experiment)
    return experiment


def cells_to_redo(
    experiment: Experiment, cells: Sequence[Cell], shared: Any, *, overwrite: bool, redo_changed: bool
) -> frozenset[Cell]:
    """The cells that are to be trained anew.

    Raises:
        UserError: some were trained with another configuration, and nothing was said about them.
    """
    from cocoop_fast.protocols.cells import changed_cells, refuse_changed

    if overwrite:
        return frozenset(cells)
    changed = changed_cells(cells, shared.dataset)
    if not redo_changed:
        refuse_changed(changed)
    return frozenset(changed)


def collect(experiment: Experiment, cells: Sequence[Cell], running: Any) -> list[Outcome]:
    """Outcomes in the order of the cells. The files are written after each, so that an interruption leaves a table."""
    from contextlib import closing

    from cocoop_fast.protocols.outputs import write_outputs
    from cocoop_fast.protocols.run_cell import Outcome

    outcomes = {cell: Outcome(cell) for cell in cells}
    with closing(running):
        for outcome in running:
            outcomes[outcome.cell] = outcome
            write_outputs(experiment, list(outcomes.values()))
    return list(outcomes.values())


def finish(experiment: Experiment, outcomes: Sequence[Outcome], *, json: bool) -> None:
    """Print the table.

    Raises:
        UserError: cells failed; each has been told of.
    """
    from cocoop_fast.protocols.outputs import columns_and_rows, notes, write_outputs
    from cocoop_fast.protocols.table import make_table

    results = write_outputs(experiment, outcomes)
    if json:
        output.print_json({"command": "run", "output_dir": str(experiment.root), **results})
    else:
        entries = make_table(experiment, outcomes)
        print(experiment.protocol.title)
        output.print_table(*columns_and_rows(entries), left=2)
        for note in notes(experiment, outcomes, entries):
            print(note)
        print(f"Written: results.json, table.md and table.csv in {experiment.root}")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    output.warn([f"{outcome.cell} failed: {' '.join(outcome.error.split())}" for outcome in failed])
    if failed:
        raise UserError(
            f"{len(failed)} of {len(outcomes)} cells failed; the same command tries them again.",
            exit_status=1,
        )


def join_lists(arguments: Sequence[str]) -> list[str]:
    """``--seeds 1 2 3`` as the parser knows it, ``--seeds 1,2,3``.

    A list ends at the next option, and at the first key of trailing ``KEY VALUE`` pairs.
    """
    from cocoop_fast.cli.reference_config import is_reference_key

    fields = configuration.field_names()
    joined: list[str] = []
    values: list[str] | None = None

    def is_end(text: str) -> bool:
        return text.startswith("-") or text in fields or is_reference_key(text)

    for argument in arguments:
        if values is not None and not is_end(argument):
            values.append(argument)
            continue
        if values:
            joined.append(",".join(values))
        values = [] if argument in LISTS else None
        joined.append(argument)
    if values:
        joined.append(",".join(values))
    return joined


def _names(text: str | None, option_name: str) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise UserError(f"{option_name} has an empty name; separate names by spaces or single commas.")
    return list(dict.fromkeys(names))


def _methods(text: str | None) -> list[str]:
    from cocoop_fast.cli.train import METHODS

    names = _names(text, "--methods")
    if names is None:
        return ["zeroshot", "coop", "cocoop"]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: there is no method {name!r}; choose from {', '.join(METHODS)}.")
    return names


def _seeds(text: str | None) -> list[int]:
    names = _names(text, "--seeds")
    if names is None:
        return [1, 2, 3]
    for name in names:
        if not name.isascii() or not name.isdigit():
            raise UserError(f"--seeds has {name!r}, but seeds are whole numbers from 0.")
    return list(dict.fromkeys(int(name) for name in names))


def _place(text: str, data: DataConfig, places: dict[str, DataConfig], option_name: str) -> str:
    """Note where a data set is, and return its name: NAME in the registry, or NAME=PATH.

    Raises:
        UserError: a name that cannot be a directory's, or one for two places.
    """
    name, equals, path = text.partition("=")
    if equals and (not path or not name.replace("-", "").replace("_", "").isalnum()):
        raise UserError(f"{option_name}: {text!r} is not NAME=PATH with a NAME of letters, digits, - and _.")
    place = replace(data, name="folder", root=Path(path)) if equals else replace(data, name=name)
    if places.setdefault(name, place) != place:
        raise UserError(f"{option_name}: {name} is named with two places.")
    return name
