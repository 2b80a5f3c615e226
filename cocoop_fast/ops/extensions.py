"""The compiled extensions, `cocoop_fast._C` (C++) and `cocoop_fast._cuda` (CUDA C++), loaded when first asked for.

Importing this module loads neither.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch  # first: its OpenMP runtime is then in the process, and ours starts no second pool of threads

_PACKAGE = Path(__file__).parents[1]


@dataclass
class Extension:
    """One of them.

    Args:
        name: below `cocoop_fast`.
        kind: for people, "C++" or "CUDA".
        why_not_built: what the installation may have lacked.
        instead: what serves without it.
        remedy: how to get it.
        folder: where it would lie.
    """

    name: str
    kind: str
    why_not_built: str
    instead: str
    remedy: str
    folder: Path = _PACKAGE
    _found: ModuleType | str | None = field(default=None, repr=False)  # it, or why there is none

    def load(self) -> ModuleType:
        """The module.

        Raises:
            RuntimeError: it was not built or cannot be loaded. The message has every cause found and what to do; it
                is kept, so later calls raise it again at no cost.
        """
        if self._found is None:
            try:
                self._found = importlib.import_module(f"cocoop_fast.{self.name}")
            except ImportError as error:
                self._found = self._explain(error)
        if isinstance(self._found, str):
            raise RuntimeError(self._found)
        return self._found

    def why_unavailable(self) -> str | None:
        """Why it cannot be loaded; None if it can."""
        try:
            self.load()
        except RuntimeError as error:
            return str(error)
        return None

    def describe(self) -> str:
        """One line for people: what it was compiled with, or why there is none."""
        reason = self.why_unavailable()
        if reason is not None:
            return reason
        built = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in self.load().build_info().items()
        )
        return f"cocoop_fast: the {self.kind} extension works ({built})"

    def _explain(self, error: ImportError) -> str:
        causes = [f"{type(error).__name__}: {error}"]
        if isinstance(error, ModuleNotFoundError) and error.name == f"cocoop_fast.{self.name}":
            if files := sorted(path.name for path in self.folder.glob(f"{self.name}.*")):
                causes.append(f"there is {', '.join(files)}, perhaps built for another Python")
            else:
                causes.append(
                    f"the installation did not build it: {self.why_not_built}, or it was told not to"
                )
        return (
            f"the {self.kind} extension of cocoop_fast cannot be used ({'; '.join(causes)}). {self.instead} need no "
            f"extension. To build it, {self.remedy}"
        )


CPP = Extension(
    "_C",
    "C++",
    why_not_built="no working C++ compiler",
    instead="The torch operations",
    remedy="install g++ or clang++ (and python3-dev on Debian and Ubuntu), then run `pip install -v "
    "--force-reinstall --no-deps` on the package: the output has a line that starts with 'cocoop_fast:' if it fails "
    "again",
)
CUDA = Extension(
    "_cuda",
    "CUDA",
    why_not_built="it found no nvcc",
    instead="The Triton kernels",
    remedy="install the CUDA toolkit (nvcc) and run `COCOOP_FAST_CUDA=1 pip install -v --force-reinstall --no-deps` on "
    "the package",
)


def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot run on the current device, or None if they can."""
    if reason := CUDA.why_unavailable():
        return reason
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return (
            "torch finds no NVIDIA GPU with a working driver here (`nvidia-smi` shows what the driver sees)"
        )
    info = CUDA.load().build_info()
    built_for = [divmod(int(number), 10) for number in info["architectures"].split()]
    needed = min(10 * major + minor for major, minor in built_for)
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < needed:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and the CUDA kernels "
            f"need {needed // 10}.{needed % 10} or later"
        )
    # Machine code runs on drivers of the toolkit's major version and later; what the driver has to compile itself, for a
    # GPU that there is no machine code for, on those of the toolkit and later.
    toolkit = tuple(int(number) for number in info["toolkit"].split("."))
    driver = driver_version()
    ready = any(built[0] == major and built[1] <= minor for built in built_for)
    if driver is not None and driver < (toolkit[:1] if ready else toolkit):
        return (
            f"the CUDA kernels were built with CUDA {info['toolkit']}, and the driver here knows CUDA "
            f"{driver[0]}.{driver[1]} at most; a newer driver or an older toolkit would do"
        )
    return None


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver knows; None where it does not say."""
    version = ctypes.c_int()
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000, version.value % 1000 // 10
    return None
