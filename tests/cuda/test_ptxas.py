"""What nvcc makes of the kernels: it builds them all, for every architecture, and spills no register."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN1a12_GLOBAL__N__b18head_fwd_kernelI6__halfLi8EEEvNS_1BE' for 'sm_90'
ptxas info    : Function properties for _ZN1a12_GLOBAL__N__b18head_fwd_kernelI6__halfLi8EEEvNS_1BE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 16 bytes cumulative stack size
"""


@pytest.fixture
def report(monkeypatch):
    """tools/ptxas_report.py"""
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("ptxas_report", TOOLS / "ptxas_report.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ptxas_report", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(report):
    return report.TOOLKIT["find_nvcc"]() or pytest.skip("no nvcc here")


def test_every_kernel_builds_and_none_spills(report, nvcc):
    architectures = report.TOOLKIT["architectures_of"](nvcc)
    found = report.compile_all(nvcc, architectures, jobs=2)
    assert [str(one) for one in found if one.problem()] == []
    kernels = {(one.module, one.kernel) for one in found}
    attention = ("fwd", "bwd_query", "bwd_key", "bwd_reduce")
    assert kernels == {
        *(("tree_attention", f"tree_attention_{name}") for name in attention),
        *(
            ("assemble_prompts", name)
            for name in ("assemble_prompts_fwd", "assemble_prompts_bwd", "assemble_dense")
        ),
    }
    # Each for three types and as many widths; the copy for three widths alone.
    assert len(found) == len(architectures) * (4 * 3 * 3 + 2 * 3 * 2 + 3)
    assert {one.target for one in found} == {f"sm_{number}" for number in architectures}


def test_a_kernel_that_spills_or_does_not_compile_is_found(report, nvcc, tmp_path):
    """Sixty-four numbers at a run-time index are in local memory, whatever the compiler does."""
    wasteful = tmp_path / "wasteful.cu"
    wasteful.write_text(
        "template <class T, int n> __global__ void wasteful_kernel(float* x, int at) {\n"
        "    float held[64];\n"
        "    for (int i = 0; i < 64; i++) held[i] = x[i] + x[i * at];\n"
        "    x[0] = held[at] + held[at ^ 7];\n"
        "}\n"
        "template __global__ void wasteful_kernel<float, 8>(float*, int);\n"
    )
    broken = tmp_path / "broken.cu"
    broken.write_text("#error not for this machine\n")
    spilled, failed = report.compile_all(nvcc, [90], 2, [wasteful, broken])
    assert "bytes of local memory" in spilled.problem()
    assert "not for this machine" in failed.problem()


def test_figures_are_read(report):
    (one,) = report.parse(OUTPUT, "head", "sm_90")
    assert (one.kernel, one.dtype, one.name) == ("head_fwd", "fp16", "8 numbers at a time")
    assert (one.registers, one.shared_bytes, one.local_bytes) == (40, 128, 16)
    assert "spills: 16 bytes" in one.problem()


@pytest.mark.parametrize(
    "old, new, message",
    [("6__half", "3int", "no kernel has the name"), ("Used 40", "Used some", "names 1 kernels, 0 were read")],
)
def test_what_is_not_understood_is_an_error(report, old, new, message):
    with pytest.raises(ValueError, match=message):
        report.parse(OUTPUT.replace(old, new), "head", "sm_90")


def test_sections_have_the_text_of_the_sources(report, nvcc, monkeypatch):
    monkeypatch.setattr(report, "compile_all", lambda nvcc, architectures, jobs: [])
    for title, text, _ in report.cuda_sections(1):
        assert title.endswith("(CUDA C++)")
        assert "Predicted" in text
