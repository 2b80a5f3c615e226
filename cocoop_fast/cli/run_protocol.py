"""``cocoop-fast run``, and ``sweep``, which is ``run --devices all``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cocoop_fast.cli import configuration, options, output
from cocoop_fast.cli.options import AtLeastOne, Given
from cocoop_fast.errors import UserError
from cocoop_fast.spelling import meant
from cocoop_fast.variants import refuse_common

if TYPE_CHECKING:
    from cocoop_fast.config import DataConfig
    from cocoop_fast.protocols.cells import Experiment
    from cocoop_fast.protocols.dense_time import DenseTime
    from cocoop_fast.protocols.protocol import Protocol
    from cocoop_fast.protocols.run_cell import Outcome

_DIGITS = 18  # of a number that fits in 64 bits
DEMO = "digits"  # the images that are always there
FIELDS = "data.root data.shots model.name model.pretrained model.precision data.workers"


def run(
    protocol: str,
    pairs: list[str] | None = None,
    *,
    config: list[Path] | None = None,
    given: Given,
    datasets: str | None = None,
    methods: str = ",".join(options.PAPER_METHODS),
    seeds: str = "1,2,3",
    source: str | None = None,
    all_classes: bool = False,
    shot_counts: str | None = None,
    devices: str | None = None,
    jobs: AtLeastOne = 1,
    launcher: Literal["local", "slurm", "ray"] = "local",
    resources: str | None = None,
    output_dir: Path | None = None,
    overwrite: bool = False,
    redo_changed: bool = False,
    dense_time: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run one of the paper's experiments: every method on every data set with every seed, then the table.

    Stopped at any moment, the same command goes on: finished cells are read, a half-trained one resumes from its
    checkpoint. A cell that fails does not stop the others; failures are listed at the end, and the exit status is 1.
    Features of test images are computed once for all methods and seeds.

    Args:
        protocol: base2new, cross-dataset, domain-generalization or few-shot.
        datasets: Of `cocoop-fast datasets`, or NAME=PATH for your own. Default: the paper's; without --root, digits.
        methods: Those of the table, each a row; a plus makes a variant, as in cocoop+consistency+no-image.
        seeds: Each draws its own shots.
        source: Data set to train on; for cross-dataset and domain-generalization. Default: imagenet, the paper's.
        all_classes: base2new: test on base and new classes together, too.
        shot_counts: few-shot: numbers of training images a class. Default: 1 2 4 8 16.
        devices: Several cells at a time, in one process for each of these devices: cpu, cuda:N, or all, which is every
            GPU, or the CPU.
        jobs: Cells at a time on each of the devices.
        launcher: Who runs the cells: this machine; SLURM, a job each; or Ray, a task each.
        resources: Of each SLURM job, as submitit names them (timeout_min=600 gpus_per_node=1 slurm_partition=gpu), or of
            each Ray task (num_gpus=1).
        output_dir: Of cells and tables. Default: output/PROTOCOL.
        overwrite: Train all cells anew.
        redo_changed: Train those cells anew that were trained with other settings.
        dense_time: At the end, measure a few steps of the dense computation too, and say how long it would have taken.

    Examples:
        Table 1 on the embedded digits: run base2new --seeds 1 2 3
        What consistency and the image add to CoCoOp: run base2new --methods zeroshot cocoop cocoop+consistency
            cocoop+consistency+no-image
        Table 1 on the paper's data sets: run base2new --root DATA --model ViT-B/16 --seeds 1 2 3
        On two GPUs, two cells at a time on each: run base2new --devices cuda:0 cuda:1 --jobs 2 --root DATA
            --model ViT-B/16
        As jobs of SLURM: run base2new --launcher slurm --resources gpus_per_node=1 slurm_partition=gpu --root DATA
            --model ViT-B/16
        The few-shot curves of your own folders: run few-shot --datasets photos=photos --model ViT-B/16
        Table 2 with folders of your own: run cross-dataset --source a=photos/a --datasets b=photos/b c=photos/c
            --model ViT-B/16
    """
    with output.loading(silent=quiet):
        from cocoop_fast.cli.cell_rows import rows_of
        from cocoop_fast.cli.launch import choose_launcher
        from cocoop_fast.cli.progress import observe
        from cocoop_fast.evaluation.feature_cache import FeatureCache
        from cocoop_fast.experiments.shared import Shared
        from cocoop_fast.protocols.cells import (
            Experiment,
            changed_cells,
            check_present,
            make_cells,
            refuse_changed,
        )
        from cocoop_fast.protocols.launchers import read_then_launch
        from cocoop_fast.protocols.outputs import write_outputs
        from cocoop_fast.protocols.protocol import PROTOCOLS, find_protocol
        from cocoop_fast.protocols.run_cell import CellWork, Outcome, run_cells

    setting = find_protocol(protocol)
    built = configuration.build(config, given, pairs, protocol=True)
    output.warn(built.warnings)
    if all_classes and setting.subset != "base":
        raise UserError(
            f"--all-classes is for {next(iter(PROTOCOLS))}, where models know half of the classes."
        )
    trained_on, tested_on, places = data_sets(setting, built, source, datasets)
    settings = built.config
    if "model.name" not in built.said:
        settings = configuration.with_embedded_clip(settings, trained_on or tested_on[0])
    asked = Experiment(
        protocol=setting,
        config=settings,
        data=places,
        datasets=tested_on,
        methods=options.methods_of(methods, "--methods"),
        seeds=_whole_numbers(seeds, "--seeds", "seeds", least=0),
        root=output_dir or Path("output") / setting.name,
        source=trained_on,
        all_classes=all_classes,
        shots=shots_of(setting, shot_counts),
    )
    refuse_common(asked.config, asked.methods)
    options.refuse_file(asked.root)
    check_present(asked)

    launch, asked, device = choose_launcher(launcher, asked, devices, jobs, resources)
    cells = make_cells(asked)
    folder = asked.root / "features"
    with output.only_json(json), observe(quiet=quiet or launch is not None) as observer:
        shared = Shared(FeatureCache(folder, observer.on_message))
        changed = {} if overwrite else changed_cells(cells, shared.dataset)
        if not redo_changed:
            refuse_changed(changed)
        anew = frozenset(cells if overwrite else changed)
        running: Any  # a generator of outcomes, in the order in which cells end
        if launch is not None:
            running = read_then_launch(cells, shared, launch, CellWork(folder, device), overwrite=anew)
        else:
            shared.clip(asked.config.model)  # what is wrong with it is wrong for every cell
            running = run_cells(cells, shared, observer, overwrite=anew)
        outcomes = {cell: Outcome(cell) for cell in cells}
        with rows_of(cells, quiet=quiet or launch is None) as ended, closing(running):
            for outcome in running:  # written after each, so that an interruption leaves a table
                outcomes[outcome.cell] = outcome
                results = write_outputs(asked, list(outcomes.values()))
                ended(outcome)
    dense = measured_dense_time(list(outcomes.values()), silent=quiet or json) if dense_time else None
    finish(asked, list(outcomes.values()), results, dense=dense, json=json)


command = options.command(fields=f"{FIELDS} model.device")(run)
sweep = options.command(
    fields=FIELDS,
    about="""Run the same cells as `run`, several at a time: the same as `run --devices all`.

    Both keep the same files: stopped at any moment, either goes on with what the other left.

    Examples:
        On all GPUs there are: sweep base2new --root DATA --model ViT-B/16
        On a CPU: sweep base2new --datasets digits --jobs 2
    """,
)(partial(run, devices="all"))


def data_sets(
    protocol: Protocol, built: configuration.Configuration, source: str | None, datasets: str | None
) -> tuple[str | None, tuple[str, ...], dict[str, DataConfig]]:
    """The data set that is trained on (``None``: each), those that are tested on, and where all of them are.

    Raises:
        UserError: a field or an option that this protocol decides itself, or names that cannot be used.
    """
    data = built.config.data
    if data.root is not None and data.name == "folder":
        data = replace(data, name=DEMO)  # a root alone implies a folder of classes; here it holds data sets
    decided = {"data.subset", "seed", "prompt.method", "output_dir"} & built.said
    decided |= {"data.name"} if data.name != DEMO else set()
    if protocol.shots and "data.shots" in built.said:
        raise UserError(f"{protocol.name} has several numbers of shots; give them as --shot-counts 1 2 4.")
    if decided:
        raise UserError(
            f"`{min(decided)}` is decided cell by cell; use the options of `cocoop-fast run --help`."
        )
    if source is not None and protocol.source is None:
        raise UserError(f"--source is not for {protocol.name}, which trains on each data set.")

    trained_on = None
    places: dict[str, DataConfig] = {}
    if protocol.source is not None:
        trained_on = _place(source or protocol.source, data, places, "--source")
    names: Sequence[str] = [DEMO] if data.root is None and trained_on is None else protocol.datasets
    if datasets is not None:
        names = options.list_of(datasets, "--datasets")
    tested_on = [_place(name, data, places, "--datasets") for name in names]
    others = tuple(name for name in dict.fromkeys(tested_on) if name != trained_on)
    if not others:
        raise UserError(f"--datasets names only {trained_on}, the source; name others to test on.")
    return trained_on, others, places


def finish(
    experiment: Experiment,
    outcomes: Sequence[Outcome],
    results: dict[str, Any],
    *,
    dense: DenseTime | None = None,
    json: bool,
) -> None:
    """Print the table, or its ``results``, and what was measured of the dense computation.

    Raises:
        UserError: cells failed; each has been told of.
    """
    from cocoop_fast.protocols.outputs import columns_and_rows, notes
    from cocoop_fast.protocols.table import make_table

    if json:
        measured = {} if dense is None else {"dense_time": asdict(dense)}
        output.print_json({"command": "run", "output_dir": str(experiment.root), **results, **measured})
    else:
        entries = make_table(experiment, outcomes)
        output.say(experiment.protocol.title)
        output.print_table(*columns_and_rows(entries), left=2)
        for note in notes(entries, outcomes):
            output.say(note)
        if dense is not None:
            output.say(str(dense))
        output.say(f"Written: results.json, table.md, table.csv and table.tex in {experiment.root}")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    output.warn([f"{outcome.cell} failed: {' '.join(outcome.error.split())}" for outcome in failed])
    if failed:
        raise UserError(
            f"{len(failed)} of {len(outcomes)} cells failed; the same command tries them again.",
            exit_status=1,
        )


def measured_dense_time(outcomes: Sequence[Outcome], *, silent: bool) -> DenseTime | None:
    """Of the first CoCoOp run. Without one a line says that nothing was measured."""
    from cocoop_fast.protocols.dense_time import dense_time

    tell = output.teller("run", silent=silent)
    tell("measuring a few steps of the dense computation")
    found = dense_time(outcomes)
    if found is None:
        tell("no finished run of cocoop to measure the dense computation of")
    return found


def shots_of(protocol: Protocol, text: str | None) -> tuple[int, ...]:
    """The numbers of training images a class that ``--shot-counts`` names, or the protocol's own, from few to many.

    Raises:
        UserError: something else than numbers from 1, or the option with a protocol that has one number of them.
    """
    if text is None:
        return protocol.shots
    if not protocol.shots:
        raise UserError(f"--shot-counts is for few-shot; {protocol.name} has one number of shots: --shots.")
    return tuple(sorted(_whole_numbers(text, "--shot-counts", "shots", least=1)))


def _whole_numbers(text: str, option_name: str, what: str, least: int) -> tuple[int, ...]:
    """What an option lists, each once."""
    names = options.list_of(text, option_name)
    for name in names:
        if not name.isascii() or not name.isdigit() or len(name) > _DIGITS or int(name) < least:
            raise UserError(f"{option_name} has {name!r}, but {what} are whole numbers from {least}.")
    return tuple(dict.fromkeys(int(name) for name in names))


def _place(text: str, data: DataConfig, places: dict[str, DataConfig], option_name: str) -> str:
    """Note where a data set is, and return its name: NAME in the registry, or NAME=PATH.

    Raises:
        UserError: a name that cannot be a directory's, or one for two places.
    """
    from cocoop_fast.data.registry import REGISTRY

    name, equals, path = text.partition("=")
    if equals and (not path or not name.replace("-", "").replace("_", "").isalnum()):
        raise UserError(f"{option_name}: {text!r} is not NAME=PATH with a NAME of letters, digits, - and _.")
    name = name if equals else meant(name, REGISTRY) or name
    place = replace(data, name="folder", root=Path(path)) if equals else replace(data, name=name)
    if places.setdefault(name, place) != place:
        raise UserError(f"{option_name}: {name} is named with two places.")
    return name
