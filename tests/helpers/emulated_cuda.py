"""Builds csrc/cuda for the host with the headers in cuda/emulator/, as a module like `cocoop_fast._cuda` for CPU tensors."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests/cuda/emulator"

# How kernels are compiled. "races": every memory access is reported to the emulator. "addresses": under the address
# and undefined-behaviour sanitizers, whose runtime must be in the process from its start.
FLAVOURS = {
    "races": ["-fsanitize=thread"],
    "addresses": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"],
}  # fmt: skip

FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]


@dataclass(frozen=True)
class Edit:
    """A change of a source: `old`, which must be there, becomes `new`, wherever it is."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Emulated:
    """The module, and the emulator in it."""

    module: ModuleType
    library: ctypes.CDLL
    folder: Path  # where it was built

    def set_schedule(self, number: int) -> None:
        """0: threads run in ascending order, 1: descending, else at random from this seed."""
        self.library.emulator_set_schedule(number)

    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self.library.emulator_count_launches())


def build(
    folder: Path, flavour: str = "races", edits: Sequence[Edit] = (), unchanged: Emulated | None = None
) -> Emulated:
    """Compile the sources, changed by `edits`, and load the module. Skips the test without a compiler.

    With `unchanged`, only the .cu files among the edited ones are compiled, and the rest is taken from that build.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the kernels for the host with")
    pybind11 = pytest.importorskip("pybind11")
    folder.mkdir(parents=True, exist_ok=True)
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc/cuda", sources / "cuda")
    for edit in edits:
        path = sources / "cuda" / edit.file
        text = path.read_text()
        assert edit.old in text, f"{edit.file} has no longer what a test changes: {edit.old}"
        path.write_text(text.replace(edit.old, edit.new))

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    common = [*FLAGS, f"-I{sources}", f"-I{EMULATOR}"]
    macros = ["-DCOCOOP_FAST_EMULATED", "-DCOCOOP_FAST_CUDA_ARCHITECTURES=0"]
    kernels = ["-O1", "-x", "c++", *FLAVOURS[flavour]]
    emulator = ["-O2", *(FLAVOURS[flavour] if flavour == "addresses" else [])]
    jobs = [
        (sources / "cuda/bindings.cpp", ["-O0", *macros, *python]),
        *((path, kernels) for path in sorted((sources / "cuda").glob("*.cu"))),
        (EMULATOR / "emulator.cpp", emulator),
    ]

    def compile_one(job: tuple[Path, list[str]]) -> str:
        source, flags = job
        target = str(folder / f"{source.stem}.o")
        _run([compiler, *common, *flags, "-c", str(source), "-o", target])
        return target

    reused: list[str] = []
    if unchanged is not None:
        edited = {edit.file for edit in edits}
        before = [job for job in jobs if job[0].name not in edited]
        reused = [str(unchanged.folder / f"{source.stem}.o") for source, _ in before]
        jobs = [job for job in jobs if job[0].name in edited]
    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(compile_one, jobs), *reused]
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = FLAVOURS[flavour] if flavour == "addresses" else []
    _run([compiler, "-shared", "-Wl,-Bsymbolic", *link, *objects, "-o", str(library)])
    return load(library)


def load(library: Path) -> Emulated:
    """A module that :func:`build` made."""
    name = f"{library.parent}._cuda"  # pybind11 gives the same module again for the same name
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return Emulated(module, ctypes.CDLL(str(library)), library.parent)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
