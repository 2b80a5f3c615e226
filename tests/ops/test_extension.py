"""The C++ extension and its loader: what it says of itself, and what users read when it is not there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cocoop_fast import extension


@pytest.fixture
def c():
    if not extension.extension_available():
        pytest.skip(extension.describe_extension())
    return extension.load_extension()


@pytest.fixture
def not_loaded(monkeypatch):
    """The loader as in a new process."""
    monkeypatch.setattr(extension, "_loaded", None)
    monkeypatch.setattr(extension, "_failure", None)


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
    code = "import sys, cocoop_fast.extension; print('cocoop_fast._C' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_missing_extension_is_explained_once_and_for_all(not_loaded, monkeypatch, tmp_path):
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "cocoop_fast._C", None)  # import then raises ModuleNotFoundError
        missing.setattr(extension, "__file__", str(tmp_path / "extension.py"))
        with pytest.raises(
            RuntimeError, match=r"did not build it.*install g\+\+ or clang\+\+.*pip install -v"
        ):
            extension.load_extension()
    # Kept: the next call fails in the same words, although nothing is in the way any more.
    assert not extension.extension_available()
    with pytest.raises(RuntimeError, match="did not build it"):
        extension.load_extension()
    assert "did not build it" in extension.describe_extension()


def test_extension_of_another_python_is_named(not_loaded, monkeypatch, tmp_path):
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    monkeypatch.setitem(sys.modules, "cocoop_fast._C", None)
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    with pytest.raises(RuntimeError, match=r"_C\.cpython-39-\S+, perhaps built for another Python"):
        extension.load_extension()


def test_extension_that_does_not_load_gives_the_loader_s_words(not_loaded, monkeypatch):
    def broken(name):
        if name == "cocoop_fast._C":
            raise ImportError("libgomp.so.1: cannot open shared object file")
        return torch

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match=r"cannot be used \(ImportError: libgomp\.so\.1: cannot open"):
        extension.load_extension()


def test_description_names_compiler_and_processor(c):
    assert c.build_info()["compiler"] in extension.describe_extension()
