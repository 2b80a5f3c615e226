"""How long a device takes for an operation: GPUs by their data sheets. ``measure`` has this machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil
from typing import Any, Protocol

import torch
import yaml

from cocoop_fast.errors import UserError
from cocoop_fast.measure.cost import Operation, Product
from cocoop_fast.spelling import near, spelling

# What is assumed where nothing is measured. Large GEMMs reach about this share of the dense peak, streaming kernels
# this share of the bandwidth; a launch costs this much replayed from a CUDA graph, and this much from eager PyTorch.
GEMM_EFFICIENCY = 0.6
BANDWIDTH_EFFICIENCY = 0.75
GRAPH_LAUNCH_SECONDS = 2e-6
EAGER_LAUNCH_SECONDS = 8e-6
# A product is cut into tiles of this many rows and columns, each the work of one multiprocessor: with fewer tiles than
# multiprocessors the others stand idle.
TILE = (64, 128)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Device(Protocol):
    """Anything that can be planned for."""

    @property
    def name(self) -> str: ...

    @property
    def memory_bytes(self) -> int | None:
        """What a process can have of it; None if that is not known."""

    def rates(self) -> dict[str, str]:
        """What the prediction rests on, for people: a name and a value with its unit."""

    def seconds(self, operation: Operation, itemsize: int, *, eager: bool = False) -> float:
        """Predicted seconds of all calls of an operation on elements of `itemsize` bytes.

        `eager`: launched one by one by PyTorch instead of replayed.
        """


@dataclass(frozen=True)
class Gpu:
    """One record of assets/gpus.yaml."""

    name: str
    memory_gb: float
    bandwidth_gbs: float
    units: int  # streaming multiprocessors
    tflops: dict[str, float]  # dense peak by precision
    source: str
    aliases: tuple[str, ...] = ()

    def at(self, precision: str) -> DataSheet:
        """This GPU computing in a precision.

        Raises:
            UserError: it cannot.
        """
        if precision not in self.tflops:
            raise UserError(
                f"The {self.name} does not compute in {precision}; choose --precision {' or '.join(self.tflops)}."
            )
        return DataSheet(self, 1e12 * self.tflops[precision])


@dataclass(frozen=True)
class DataSheet:
    """A GPU in one precision: the slower of arithmetic and memory, and the launches."""

    gpu: Gpu
    peak_flops: float

    @property
    def name(self) -> str:
        return self.gpu.name

    @property
    def memory_bytes(self) -> int:
        return round(1e9 * self.gpu.memory_gb)

    def rates(self) -> dict[str, str]:
        return {
            "peak": f"{self.peak_flops / 1e12:g} TFLOP/s, of which {GEMM_EFFICIENCY:.0%} are assumed",
            "bandwidth": f"{self.gpu.bandwidth_gbs:,.0f} GB/s, of which {BANDWIDTH_EFFICIENCY:.0%} are assumed",
            "source": self.gpu.source,
        }

    def seconds(self, operation: Operation, itemsize: int, *, eager: bool = False) -> float:
        rate = GEMM_EFFICIENCY * self.peak_flops
        if isinstance(operation, Product):
            tiles = ceil(operation.rows / TILE[0]) * ceil(operation.columns / TILE[1])
            rate *= min(1.0, tiles / self.gpu.units)
        arithmetic = operation.flops / rate
        memory = itemsize * operation.elements / (BANDWIDTH_EFFICIENCY * 1e9 * self.gpu.bandwidth_gbs)
        launch = EAGER_LAUNCH_SECONDS if eager else GRAPH_LAUNCH_SECONDS
        return max(arithmetic, memory) + launch * operation.launches


@cache
def gpu_table() -> tuple[Gpu, ...]:
    """All records of assets/gpus.yaml."""
    text = files("cocoop_fast").joinpath("assets/gpus.yaml").read_text(encoding="utf-8")
    records: list[dict[str, Any]] = yaml.safe_load(text)
    return tuple(Gpu(**{**record, "aliases": tuple(record.get("aliases", ()))}) for record in records)


def find_gpu(name: str) -> Gpu:
    """The record of a GPU by its name or an alias; case, spaces and hyphens do not count.

    Raises:
        UserError: there is none.
    """
    by_key = {spelling(known): gpu for gpu in gpu_table() for known in (gpu.name, *gpu.aliases)}
    key = spelling(name)
    found = by_key.get(key) or by_key.get(key.removeprefix("nvidia").removeprefix("amd"))
    if found is None:
        alike = near(name, by_key)
        hint = (
            f"did you mean {by_key[alike[0]].name}?"
            if alike
            else "`cocoop-fast plan --list-devices` names all."
        )
        raise UserError(f"There is no device '{name}' in the table; {hint}")
    return found
