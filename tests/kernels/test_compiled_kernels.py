"""Every variant of every Triton kernel compiles for its targets, within its memories; and docs/kernels.md names them.

Compilation runs in another process, as Triton is in its interpreter in this one.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

import cocoop_fast.kernels

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def variants():
    """Module name -> its variants."""
    names = [module.name for module in pkgutil.iter_modules(cocoop_fast.kernels.__path__)]
    modules = {name: importlib.import_module(f"cocoop_fast.kernels.{name}") for name in names}
    return {name: module.VARIANTS for name, module in modules.items() if hasattr(module, "VARIANTS")}


def run_script(script, *arguments):
    folders = (ROOT, ROOT / "tools", ROOT / "tests" / "helpers", Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment
    )


def compile_kernels(*arguments):
    return run_script(ROOT / "tools" / "compile_kernels.py", *arguments)


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(("sm_90",), id="one GPU", marks=pytest.mark.slow),
        pytest.param(TARGETS, id="all", marks=pytest.mark.soak),  # tools/make_kernels_page.py does it, too
    ],
)
def test_every_variant_compiles(variants, tmp_path, targets):
    """Its exit status says that nothing spills and that shared memory suffices; below, that nothing was left out."""
    only = [argument for target in targets for argument in ("--target", target)]
    result = compile_kernels("--json", tmp_path / "resources.json", *only)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "resources.json").read_text())
    compiled = Counter(
        (one["module"], one["kernel"], one["dtype"], one["name"], one["target"]) for one in found
    )
    assert compiled == Counter(
        (module, variant.kernel_name, variant.dtype, variant.name, target)
        for module, own in variants.items()
        for variant in own
        for target in targets
    )
    assert max(compiled.values()) == 1, "two variants have the same name"
    assert all(0 < one["registers"] <= 512 for one in found)  # 255 on NVIDIA, 512 on AMD


@pytest.mark.slow
def test_the_widest_variants_compile_for_the_other_maker(variants, tmp_path):
    """They are the likeliest to spill; all of them are compiled above, with -m soak."""
    result = compile_kernels("--widest", "--target", "gfx942", "--json", tmp_path / "resources.json")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "resources.json").read_text())
    assert {one["target"] for one in found} == {"gfx942"}
    assert {(one["module"], one["kernel"], one["dtype"]) for one in found} == {
        (module, variant.kernel_name, variant.dtype) for module, own in variants.items() for variant in own
    }


@pytest.mark.soak
def test_attention_compiles_for_the_other_gpus_of_amd():
    """For gfx1100, a consumer's card, the kernels are in want of registers: there they spill, which is slow and right."""
    others = [argument for target in ("gfx90a", "gfx1100") for argument in ("--target", target)]
    result = compile_kernels("cocoop_fast.kernels.tree_attention", *others)
    assert "kernels compiled" in result.stdout, result.stderr
    assert not [line for line in result.stderr.splitlines() if "for gfx1100: spills" not in line]


def test_a_step_launches_what_was_compiled():
    """Pointers and sizes marked as the launch marks them: a tensor below 2 GB is another one to AMD's compiler."""
    result = run_script(Path(__file__).with_name("launched_kernels.py"))
    assert result.returncode == 0, result.stderr
    targets = dict(re.findall(r"^(\w+): (\d+) launched$", result.stdout, re.M))
    assert targets.keys() == {"sm_90", "gfx942"} and min(map(int, targets.values())) > 20
    assert "no variant" not in result.stdout, result.stdout


@pytest.mark.parametrize("one_load", [True, False])
def test_rows_come_by_one_load_but_not_on_amd(variants, one_load):
    attention = [one for one in variants["tree_attention"] if "ONE_LOAD" in one.constexprs]
    backend = "cuda" if one_load else "hip"
    assert attention and all(one.constexprs_for(backend)["ONE_LOAD"] is one_load for one in attention)


def test_what_must_not_pass_is_found():
    targets = ("sm_90", "gfx942")
    only = [argument for target in targets for argument in ("--target", target)]
    result = compile_kernels("wasteful_kernels", "--jobs", "1", *only)
    assert result.returncode == 1
    for target in targets:
        for problem in (
            f"spilling fp32 for {target}: spills: [0-9]+ bytes of local memory",
            f"greedy fp16 for {target}: needs [0-9]+ bytes of shared memory",
            f"wrong fp32 for {target}: does not compile: .*undefined_name",
        ):
            assert re.search(f"^wasteful_kernels {problem}", result.stderr, re.M), result.stderr


@pytest.mark.soak
def test_a_compiler_that_crashes_costs_its_kernel_alone():
    result = compile_kernels("crashing_kernels", "--jobs", "2", "--target", "sm_90")
    assert result.returncode == 1 and "2 kernels compiled" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        "crashing_kernels crashing fp32 for sm_90: does not compile: the compiler crashed"
    )


def test_the_page_is_up_to_date(variants):
    """Its texts and its counts of variants, that is; the registers depend on the compilers' versions."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    remedy = "run python tools/make_kernels_page.py"
    sections = dict(re.findall(r"^## (\w+) \(Triton [^)]*\)\n\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert set(sections) == set(variants), remedy
    cuda = {source.stem for source in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert set(re.findall(r"^## (\w+) \(CUDA C\+\+\)$", page, re.M)) == cuda, remedy
    for name, own in variants.items():
        docstring = importlib.import_module(f"cocoop_fast.kernels.{name}").__doc__
        assert sections[name].startswith(docstring.strip()), f"{name}: {remedy}"
        listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d+) \|", sections[name], re.M)
        counts = Counter((variant.kernel_name, variant.dtype) for variant in own)
        assert {(kernel, dtype): int(count) for kernel, dtype, count in listed} == counts, f"{name}: {remedy}"
