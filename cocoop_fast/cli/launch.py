"""Which launcher runs the cells of ``cocoop-fast run``, and on which devices."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from cocoop_fast.cli import options
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.protocols.cells import Experiment
    from cocoop_fast.protocols.launchers import Launcher

_ONE_GPU = {"slurm": "gpus_per_node", "ray": "num_gpus"}  # the resource that asks for a GPU


def choose_launcher(
    name: str, asked: Experiment, devices: str | None, jobs: int, resources: str | None
) -> tuple[Launcher | None, Experiment, str | None]:
    """The launcher (``None``: cells one after the other in this process), the experiment with what the launcher decides
    of its configuration, and the device of its workers (``None``: each process has its own).

    Raises:
        UserError: options that do not go together, or devices that are not there.
    """
    from cocoop_fast.protocols.cells import on_device
    from cocoop_fast.protocols.launchers import Ray, Slurm
    from cocoop_fast.protocols.processes import Processes

    if name == "local":
        if resources is not None:
            raise UserError(
                "--resources is for --launcher slurm and ray; on this machine: --devices and --jobs."
            )
        if devices is None and jobs == 1:
            return None, asked, None
        names = device_names(asked.config.model.device if devices is None else devices)
        threads = max(1, (os.cpu_count() or 1) // jobs) if names == ["cpu"] else None
        # A device decides the precision "auto", and so the configuration that is compared with finished cells'.
        return (
            Processes([one for one in names for _ in range(jobs)], threads),
            on_device(asked, names[0]),
            None,
        )
    if devices is not None or jobs > 1:
        raise UserError(
            f"--devices and --jobs are for this machine; say what a cell needs of {name} by --resources."
        )
    of_each = _values(resources)
    asked, device, of_each = _elsewhere(name, asked, of_each)
    launch: Launcher = Slurm(asked.root / "slurm", of_each) if name == "slurm" else Ray(of_each)
    return launch, asked, device


def _elsewhere(
    name: str, asked: Experiment, resources: dict[str, Any]
) -> tuple[Experiment, str, dict[str, Any]]:
    """The device of workers on other machines: a GPU if --device or a resource says so. This machine need not have it."""
    from cocoop_fast.protocols.cells import on_device

    model = asked.config.model
    gpu = model.device.startswith("cuda") or any("gpu" in key or "gres" in key for key in resources)
    gpu = gpu and model.device != "cpu"
    if gpu and not any("gpu" in key or "gres" in key for key in resources):
        resources = {**resources, _ONE_GPU[name]: 1}
    precision = model.precision
    if (
        precision == "auto"
    ):  # what it becomes there, so that cells are compared with those of any other launcher
        precision = "fp16" if gpu else "fp32"
    asked = replace(asked, config=replace(asked.config, model=replace(model, precision=precision)))
    return on_device(asked, "auto"), "cuda" if gpu else "cpu", resources


def _values(text: str | None) -> dict[str, Any]:
    """``name=value`` pairs, with values as YAML has them.

    Raises:
        UserError: something else.
    """
    values = {}
    for pair in options.list_of(text, "--resources") if text is not None else ():
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals or not value:
            raise UserError(f"--resources has {pair!r}, but each is NAME=VALUE, for example gpus_per_node=1.")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--resources: the value of {pair!r} cannot be read.") from error
    return values


def device_names(text: str) -> list[str]:
    """Devices to use, each once; ``all``: every GPU, or the CPU.

    Raises:
        UserError: a device that is unknown or not there, or CPU and GPUs together, whose precision differs.
    """
    import torch

    from cocoop_fast.clip.load import resolve_device

    if text == "all":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [f"cuda:{i}" for i in range(count)] or ["cpu"]
    names = list(dict.fromkeys(str(resolve_device(name)) for name in options.list_of(text, "--devices")))
    if len({name.partition(":")[0] for name in names}) > 1:
        raise UserError("--devices has both the CPU and GPUs; cells of one table should not differ in that.")
    return names
