"""The CUDA extension's build and loader: when it is built, and what users read when it is not or cannot run."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cocoop_fast import UserError
from cocoop_fast.ops import extensions
from cocoop_fast.ops.extensions import CUDA, why_no_cuda
from cocoop_fast.ops.table import select_backend

ROOT = Path(__file__).parents[2]

# Stands for nvcc: lists architectures, and compiles with a C++ compiler what needs no CUDA.
FAKE_NVCC = """#!/bin/sh
case "$*" in
--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit 0 ;;
*broken.cu*) echo "broken.cu: error: this source is broken" >&2; exit 1 ;;
*"code=sm_86"* | *"code=sm_100"*) echo "an architecture that this nvcc does not have" >&2; exit 1 ;;
*-shared*) exec {cxx} -shared $(echo "$*" | tr ' ' '\\n' | grep '[.]o$') -o "$(echo "$*" | sed 's/.*-o //')" ;;
*) exec {cxx} -x c++ -fPIC $(echo "$*" | tr ' ' '\\n' | grep '^-I') -c \
    $(echo "$*" | tr ' ' '\\n' | grep '[.]\\(cu\\|cpp\\)$') -o "$(echo "$*" | sed 's/.*-o //')" ;;
esac
"""

MODULE = """#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda"};
PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&definition); }
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what setup.py reads, with a csrc/ of a few lines and a compiler in the place of nvcc."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    compiler = shutil.which("g++") or pytest.skip("no g++ here")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("# cocoop_fast\n")
    for name in ("cocoop_fast", "kernels", "csrc/cuda"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cocoop_fast/__init__.py").touch()
    (tmp_path / "kernels/__init__.py").touch()
    (tmp_path / "csrc/bindings.cpp").write_text("#error\n")  # the C++ extension is not what is tested
    shutil.copy(ROOT / "csrc/cuda/nvcc.py", tmp_path / "csrc/cuda")
    (tmp_path / "csrc/cuda/bindings.cpp").write_text(MODULE)
    (tmp_path / "csrc/cuda/op.cu").write_text("int op;\n")
    (tmp_path / "nvcc").write_text(FAKE_NVCC.format(cxx=compiler))
    (tmp_path / "nvcc").chmod(0o755)
    return tmp_path


def run_setup(tree, nvcc="nvcc", **variables):
    """Lines about the CUDA extension, the exit status, and whether it is there afterwards."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("COCOOP_", "CUDA"))
    }
    toolkit = {"CUDACXX": str(tree / nvcc)} if nvcc else {"PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree, env={**environment, **toolkit, **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = [line for line in result.stderr.splitlines() if "CUDA extension" in line]
    return said, result.returncode, bool(list((tree / "cocoop_fast").glob("_cuda.*")))


def test_nvcc_builds_it_for_the_architectures_that_it_knows(tree):
    said, status, there = run_setup(tree)
    assert (status, there) == (0, True), said
    assert "was built for compute capabilities 80 90 (PTX for later ones)" in said[0]


def test_not_built_when_told_not_to(tree):
    said, status, there = run_setup(tree, COCOOP_FAST_CUDA="0")
    assert (status, there) == (0, False)
    assert said == [
        "cocoop_fast: the CUDA extension was not built (COCOOP_FAST_CUDA is 0); "
        "on a GPU the Triton kernels will be used"
    ]


def test_without_nvcc_the_install_succeeds_unless_it_was_asked_for(tree):
    if Path("/usr/local/cuda/bin/nvcc").exists() or shutil.which("nvcc", path="/usr/bin:/bin"):
        finder = tree / "csrc/cuda/nvcc.py"  # this machine has one that PATH does not hide
        finder.write_text(finder.read_text() + "\ndef find_nvcc():\n    return None\n")
    said, status, there = run_setup(tree, nvcc=None)
    assert (status, there) == (0, False)
    assert "was not built (no nvcc" in said[0]
    assert "on a GPU the Triton kernels will be used" in said[0]
    said, status, there = run_setup(tree, nvcc=None, COCOOP_FAST_CUDA="1")
    assert (status, there) == (1, False)
    assert "was not built (no nvcc" in said[0]
    assert said[0].endswith("and COCOOP_FAST_CUDA is set")


def test_a_source_that_does_not_compile_does_not_break_the_install(tree):
    (tree / "csrc/cuda/broken.cu").touch()
    said, status, there = run_setup(tree)
    assert (status, there) == (0, False)
    assert "see the compiler's messages above" in said[0]
    assert run_setup(tree, COCOOP_FAST_CUDA="1")[1] == 1


# The loader


class Built:
    @staticmethod
    def build_info():
        return {"toolkit": "13.0", "architectures": "80 90"}


def test_missing_extension_is_explained(tmp_path):
    extension = replace(CUDA, name="_missing", folder=tmp_path, _found=None)
    with pytest.raises(
        RuntimeError, match=r"found no nvcc.*Triton kernels need no extension.*COCOOP_FAST_CUDA=1"
    ):
        extension.load()
    assert "found no nvcc" in extension.why_unavailable()
    assert "found no nvcc" in extension.describe()


def test_why_it_cannot_run_here(monkeypatch):
    monkeypatch.setattr(CUDA, "_found", Built)
    assert "toolkit 13.0, architectures 80 90" in CUDA.describe()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in why_no_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU with a working driver" in why_no_cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "Tesla T4 has compute capability 7.5" in why_no_cuda()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert why_no_cuda() is None


@pytest.mark.parametrize(
    "capability, driver, works",
    [
        ((9, 0), (12, 8), False),  # the fault: CUDA 13's code on a driver of the year before
        ((9, 0), (13, 0), True),
        ((8, 6), (13, 1), True),
        ((9, 0), (14, 0), True),
        ((12, 0), (13, 0), True),  # compiled by the driver, which is as new as the toolkit
        ((9, 0), None, True),  # it does not say
    ],
)
def test_a_driver_older_than_the_toolkit_is_left_to_triton(monkeypatch, capability, driver, works):
    monkeypatch.setattr(CUDA, "_found", Built)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(extensions, "driver_version", lambda: driver)
    assert (why_no_cuda() is None) is works
    if not works:
        expected = r"built with CUDA 13.0, and the driver here knows CUDA 12.8 at most.*use auto or triton"
        with pytest.raises(UserError, match=expected):
            select_backend(torch.device("cuda"), torch.float16, "cuda")
        assert select_backend(torch.device("cuda"), torch.float16).name == "triton"


@pytest.mark.parametrize("driver, works", [((13, 0), False), ((13, 1), True)])
def test_what_the_driver_compiles_needs_one_as_new_as_the_toolkit(monkeypatch, driver, works):
    class Newer(Built):
        @staticmethod
        def build_info():
            return {"toolkit": "13.1", "architectures": "80 90"}

    monkeypatch.setattr(CUDA, "_found", Newer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(extensions, "driver_version", lambda: driver)
    assert (why_no_cuda() is None) is works


def test_built_extension_loads_without_a_gpu():
    """Whatever the machine: the module has no link to the driver."""
    if reason := CUDA.why_unavailable():
        pytest.skip(reason)
    assert CUDA.load().DEVICE_TYPE == "cuda"
    assert min(map(int, CUDA.load().build_info()["architectures"].split())) >= 80
