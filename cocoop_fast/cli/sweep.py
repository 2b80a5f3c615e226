"""``cocoop-fast sweep``."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

from cocoop_fast.cli import output, run_protocol
from cocoop_fast.cli.run_protocol import (
    MACHINE,
    AllClasses,
    ConfigFiles,
    Datasets,
    Json,
    Methods,
    Model,
    OutputDir,
    Overwrite,
    Pairs,
    Precision,
    Pretrained,
    ProtocolName,
    Quiet,
    RedoChanged,
    Root,
    Seeds,
    Shots,
    Source,
    Workers,
    option,
)  # fmt: skip
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.training.observer import Observer

EPILOG = """
[bold]Examples[/bold]

On all GPUs there are: [cyan]cocoop-fast sweep base2new --root DATA --model ViT-B/16[/cyan]

On two of them, two cells at a time on each: [cyan]cocoop-fast sweep base2new --devices cuda:0 cuda:1 --jobs 2 --root DATA --model ViT-B/16[/cyan]

On a CPU: [cyan]cocoop-fast sweep base2new --datasets digits --jobs 2[/cyan]
"""


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
    devices: Annotated[
        str | None,
        option(
            MACHINE, "--devices", metavar="DEVICE ...", help="cpu, cuda:N. Default: every GPU, or the CPU."
        ),
    ] = None,
    jobs: Annotated[
        int, option(MACHINE, "--jobs", "-j", help="Cells at a time on each device. Default: 1.")
    ] = 1,
    workers: Workers = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    redo_changed: RedoChanged = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the same cells as `run`, several at a time: one process for each device.

    A cell that fails does not stop the others; failures are listed at the end, and the exit status is 1. Stopped
    at any moment, the same command goes on, and so does `run`: both keep the same files.
    """
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}, but it must be at least 1.")
    asked = run_protocol.build_experiment(
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
            "data.workers": ("--workers", workers),
        },
        pairs=pairs or (),
    )
    names = device_names(devices)

    from cocoop_fast.evaluation.feature_cache import FeatureCache
    from cocoop_fast.experiments.shared import Shared
    from cocoop_fast.protocols.cells import make_cells, on_device
    from cocoop_fast.protocols.processes import run_in_processes

    # A device decides the precision "auto", and so the configuration that is compared with that of finished cells.
    asked = on_device(asked, names[0])
    cells = make_cells(asked)
    folder = asked.root / "features"
    with output.only_json(json):
        anew = run_protocol.cells_to_redo(
            asked, cells, Shared(FeatureCache(folder)), overwrite=overwrite, redo_changed=redo_changed
        )
        running = run_in_processes(
            cells,
            [name for name in names for _ in range(jobs)],
            folder,
            partial(observer_of, quiet=quiet),
            threads=max(1, (os.cpu_count() or 1) // jobs) if names == ["cpu"] else None,
            overwrite=anew,
        )
        outcomes = run_protocol.collect(asked, cells, running)
    run_protocol.finish(asked, outcomes, json=json)


def device_names(text: str | None) -> list[str]:
    """Devices to use, each once.

    Raises:
        UserError: a device that is unknown or not there, or CPU and GPUs together, whose precision differs.
    """
    import torch

    from cocoop_fast.clip.load import resolve_device

    if text is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [f"cuda:{i}" for i in range(count)] or ["cpu"]
    names = list(dict.fromkeys(str(resolve_device(name.strip())) for name in text.split(",")))
    if len({name.partition(":")[0] for name in names}) > 1:
        raise UserError("--devices has both the CPU and GPUs; cells of one table should not differ in that.")
    return names


def observer_of(cell: str, *, quiet: bool) -> Observer:
    """Progress of a cell in a process of its own: plain lines that name the cell."""
    from cocoop_fast.cli.progress import Lines
    from cocoop_fast.training.observer import Observer

    return Observer() if quiet else Lines(_Prefixed(cell))  # type: ignore[arg-type]


class _Prefixed:
    """As much of a stream as ``print`` needs. A line is one write, so that lines of processes do not mix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._line = ""

    def write(self, text: str) -> None:
        self._line += text
        while "\n" in self._line:
            line, self._line = self._line.split("\n", 1)
            sys.stderr.write(f"[{self._prefix}] {line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
