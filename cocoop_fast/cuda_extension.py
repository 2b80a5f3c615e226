"""The CUDA extension `cocoop_fast._cuda`, loaded when first asked for. Importing this module loads nothing."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

import torch


def load_cuda_extension() -> ModuleType:
    """The module `cocoop_fast._cuda`. It loads without a GPU or its driver.

    Raises:
        RuntimeError: it was not built or cannot be loaded; the message says why and what to do.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot run on the current device, or None if they can."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return (
            "torch finds no NVIDIA GPU with a working driver here (`nvidia-smi` shows what the driver sees)"
        )
    needed = oldest_architecture(loaded)
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < needed:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and the CUDA kernels "
            f"need {needed // 10}.{needed % 10} or later"
        )
    return None


def describe_cuda_extension() -> str:
    """One line for people: what the extension was compiled for, or why there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    build = loaded.build_info()
    return (
        f"cocoop_fast: the CUDA extension was built (CUDA {build['toolkit']}; "
        f"compute capabilities {build['architectures']} and later)"
    )


def oldest_architecture(extension: ModuleType) -> int:
    """The least compute capability that it was compiled for, as 10 * major + minor."""
    return min(int(number) for number in extension.build_info()["architectures"].split())


@cache
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return importlib.import_module("cocoop_fast._cuda")
    except ImportError as error:
        return _explain(error)


def _explain(error: ImportError) -> str:
    causes = [f"{type(error).__name__}: {error}"]
    if isinstance(error, ModuleNotFoundError):
        if files := sorted(path.name for path in Path(__file__).parent.glob("_cuda.*")):
            causes.append(f"there is {', '.join(files)}, perhaps built for another Python")
        else:
            causes.append("the installation did not build it: it found no nvcc, or was told not to")
    return (
        f"the CUDA extension of cocoop_fast cannot be used ({'; '.join(causes)}). The Triton kernels need no "
        "extension. To build it, install the CUDA toolkit (nvcc) and run `COCOOP_FAST_CUDA=1 pip install -v "
        "--force-reinstall --no-deps` on the package"
    )
