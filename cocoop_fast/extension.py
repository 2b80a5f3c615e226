"""The C++ extension `cocoop_fast._C`, loaded when first asked for. Importing this module loads nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

_loaded: ModuleType | None = None
_failure: str | None = None


def load_extension() -> ModuleType:
    """The module `cocoop_fast._C`.

    Raises:
        RuntimeError: it was not built or cannot be loaded. The message has every cause found and what to do; it
            is kept, so later calls raise it again at no cost.
    """
    global _loaded, _failure
    if _loaded is None and _failure is None:
        try:
            # First torch: its OpenMP runtime is then in the process, and the extension uses that one instead of
            # starting a second pool of threads.
            importlib.import_module("torch")
            _loaded = importlib.import_module("cocoop_fast._C")
        except (ImportError, OSError) as error:  # OSError: torch's own libraries
            _failure = _explain(error)
    if _loaded is None:
        raise RuntimeError(_failure)
    return _loaded


def extension_available() -> bool:
    """Whether `load_extension()` gives the module."""
    try:
        load_extension()
    except RuntimeError:
        return False
    return True


def describe_extension() -> str:
    """One line for people: what the extension was compiled with, or why there is none."""
    try:
        extension = load_extension()
    except RuntimeError as error:
        return str(error)
    build, cpu = extension.build_info(), extension.cpu_features()
    features = [name for name, present in cpu.items() if present]
    return (
        f"cocoop_fast: the C++ extension works ({build['compiler']} {build['version']}, "
        f"C++{build['cxx_standard']}, OpenMP {'yes' if build['openmp'] else 'no'}; "
        f"this processor: {', '.join(features) or 'no vector instructions that it knows'})"
    )


def _explain(error: Exception) -> str:
    causes = [f"{type(error).__name__}: {error}"]
    if isinstance(error, ModuleNotFoundError) and error.name == "cocoop_fast._C":
        if files := sorted(path.name for path in Path(__file__).parent.glob("_C.*")):
            causes.append(f"there is {', '.join(files)}, perhaps built for another Python")
        else:
            causes.append("the installation did not build it: no working C++ compiler, or it was told not to")
    return (
        f"the C++ extension of cocoop_fast cannot be used ({'; '.join(causes)}). The torch operations need no "
        "extension. To build it, install g++ or clang++ (and python3-dev on Debian and Ubuntu), then run "
        "`pip install -v --force-reinstall --no-deps` on the package: the output has a line that starts with "
        "'cocoop_fast:' if it fails again"
    )
