"""How the CUDA sources are compiled: for setup.py, which builds them, and tools/ptxas_report.py, which examines them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

# Compute capabilities that get machine code, as far as the toolkit knows them; PTX of the newest serves later ones.
ARCHITECTURES = (80, 86, 90, 100)

# No --use_fast_math: results are compared with other backends'.
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    """CUDACXX, or nvcc of CUDA_HOME, of PATH or of the usual place; None without a toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for candidate in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def architectures_of(nvcc: str) -> list[int]:
    """Those of ARCHITECTURES that this nvcc compiles for. OSError or CalledProcessError if it does not run."""
    result = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {int(number) for number in re.findall(r"compute_(\d+)$", result.stdout, re.M)}
    return [number for number in ARCHITECTURES if number in known]


def code_flags(architectures: list[int]) -> list[str]:
    """Machine code for each, and PTX of the newest."""
    targets = [f"arch=compute_{number},code=sm_{number}" for number in architectures]
    newest = architectures[-1]
    return [f"-gencode={target}" for target in (*targets, f"arch=compute_{newest},code=compute_{newest}")]


def sources() -> list[Path]:
    """Every .cu file."""
    return sorted(Path(__file__).parent.glob("*.cu"))
