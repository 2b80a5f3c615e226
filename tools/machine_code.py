"""The machine code of a compiled Triton kernel, read by the nvdisasm that comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# A line of a listing: a label, or an address, a predicate, an operation and its operands.
LINE = re.compile(
    r"^(?P<label>\.\w+):|/\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?(?P<operation>[A-Z][\w.]*)(?P<operands>.*)"
)


@dataclass(frozen=True)
class MachineCode:
    """What the warps of a kernel execute on a GPU of NVIDIA.

    Args:
        operations: in their order, such as LDG.E.128, without what pads the end.
        loops: first and last operation of each, by their numbers.
    """

    operations: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def issued(self, trips: float = 1.0) -> float:
        """Instructions that a warp issues which passes through all of it; every loop so many times.

        A branch around something is not taken: programs in front of whole tiles have work in all of it.
        """
        inside = {number for first, last in self.loops for number in range(first, last + 1)}
        return len(self.operations) + (trips - 1.0) * len(inside)

    def widths(self, kind: str) -> Counter[int]:
        """How many of "LDG" (loads), "STG" (stores) move so many bits a thread."""
        return Counter(_bits(one) for one in self.operations if one.split(".")[0] == kind)

    def count(self, kind: str) -> int:
        """How many operations begin with this name: HMMA is the tensor cores', LDL and STL are of local memory."""
        return sum(one.split(".")[0] == kind for one in self.operations)


def read(cubin: bytes) -> MachineCode:
    """The code of the one kernel in a cubin.

    Raises:
        ValueError: the listing is not understood.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / "nvdisasm"), "-c", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(listing: str) -> MachineCode:
    """Of what nvdisasm prints. Raises ValueError as `read`."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        found = LINE.search(line.strip())
        if found is None:
            continue
        if found["label"]:
            labels[found["label"]] = len(operations)
            continue
        if found["operation"] == "BRA":
            target = re.search(r"\((\.\w+)\)", found["operands"])
            if target is None:
                raise ValueError(f"a branch to nowhere: {line.strip()}")
            branches.append((len(operations), target[1]))
        operations.append(found["operation"])
    loops = [(labels[label], number) for number, label in branches if labels[label] <= number]
    # The end is a branch to itself, which no warp reaches, and padding.
    while operations and (operations[-1] == "NOP" or loops[-1:] == [(len(operations) - 1,) * 2]):
        if operations.pop() != "NOP":
            loops.pop()
    if not operations or "EXIT" not in operations:
        raise ValueError("no machine code of a kernel")
    return MachineCode(tuple(operations), tuple(loops))


def _bits(operation: str) -> int:
    parts = operation.split(".")
    for width in (256, 128, 64):
        if str(width) in parts:
            return width
    return next((int(part[1:]) for part in parts if part in ("U8", "S8", "U16", "S16")), 32)
