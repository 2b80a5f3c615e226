"""The C++ extension and its loader: what it says of itself, and what users read when it is not there."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cocoop_fast
from cocoop_fast.ops.extensions import CPP


@pytest.fixture
def c():
    if reason := CPP.why_unavailable():
        pytest.skip(reason)
    return CPP.load()


def missing(folder, name="_missing"):
    """An extension that nobody has built."""
    return replace(CPP, name=name, folder=folder, _found=None)


def test_build_info(c):
    info = c.build_info()
    assert info["compiler"] in ("gcc", "clang")
    assert info["version"]
    assert info["cxx_standard"] >= 17
    assert isinstance(info["openmp"], bool)
    assert set(info["instruction_sets"]) <= {"avx2", "avx512", "neon"}


def test_cpu_features_agree_with_the_kernel(c):
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    # Linux writes avx512_vnni and avx512_bf16 where the compilers write avx512vnni and avx512bf16.
    known = {flag.replace("avx512_", "avx512") for flag in flags}
    for name, present in c.cpu_features().items():
        assert present == (name in known), name


def test_openmp_runtime_is_shared_with_torch(c):
    """One pool of threads, of the size that the user gave to torch."""
    if not c.build_info()["openmp"]:
        assert c.openmp_max_threads() == 1
        pytest.skip("built without OpenMP")
    if "libomp" in torch.__config__.parallel_info():
        pytest.skip("torch uses LLVM's OpenMP here")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert c.openmp_max_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_nothing_is_loaded_at_import():
    code = "import sys, cocoop_fast.ops.extensions; print('cocoop_fast._C' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_missing_extension_is_explained_once_and_for_all(tmp_path):
    extension = missing(tmp_path)
    with pytest.raises(RuntimeError, match=r"did not build it.*install g\+\+ or clang\+\+.*pip install -v"):
        extension.load()
    (tmp_path / "_missing.so").touch()  # kept: the next call fails in the same words, whatever has come since
    with pytest.raises(RuntimeError, match="did not build it"):
        extension.load()
    assert "did not build it" in extension.why_unavailable()
    assert "did not build it" in extension.describe()


def test_extension_of_another_python_is_named(tmp_path):
    (tmp_path / "_missing.cpython-39-x86_64-linux-gnu.so").touch()
    with pytest.raises(RuntimeError, match=r"_missing\.cpython-39-\S+, perhaps built for another Python"):
        missing(tmp_path).load()


def test_extension_that_does_not_load_gives_the_loader_s_words(monkeypatch, tmp_path):
    module = tmp_path / "_broken.py"
    module.write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.setattr(cocoop_fast, "__path__", [*cocoop_fast.__path__, str(tmp_path)])
    with pytest.raises(RuntimeError, match=r"cannot be used \(ImportError: libgomp\.so\.1: cannot open"):
        missing(tmp_path, "_broken").load()


def test_description_names_compiler_and_processor(c):
    assert c.build_info()["compiler"] in CPP.describe()
