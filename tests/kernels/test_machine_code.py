"""The machine code of the Triton kernels that a step launches: how wide it loads, what computes it, and how long it is.

It is compiled and disassembled in another process, as Triton is in its interpreter in this one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# Beside rows, which come and go 128 bits a thread at a time, a kernel reads and writes so many single numbers:
# a row's statistics, norms and gradients of logits, an index.
NARROW_LOADS = {"layer_norm_bwd": 2, "move_rows": 1, "head_fwd": 1, "head_bwd": 4}
NARROW_STORES = {"layer_norm_fwd": 2, "assemble_prompts_fwd": 2, "head_fwd": 2}
OF_ROWS = {
    "layer_norm_fwd",
    "layer_norm_bwd",
    "activation_fwd",
    "activation_bwd",
    "move_rows",
    "head_fwd",
    "head_bwd",
}
OF_ROWS |= {"assemble_prompts_fwd", "assemble_prompts_bwd", "unit_rows"}
OTHERS = {"cross_entropy_fwd", "cross_entropy_bwd", "meta_net_fwd", "meta_net_bwd", "step_report"}
# A thread's loads of 16 bytes of rows with 64 numbers of 2 bytes. Forward, 32 threads: 16 queries, 32 keys, 32 values.
# Backward, 128 threads: the gradients of the results as well.
ON_TENSOR_CORES = {"tree_attention_fwd": (16 + 32 + 32) // 4, "tree_attention_bwd": (16 + 16 + 32 + 32) // 16}


@pytest.fixture(scope="module")
def launches():
    folders = (ROOT, ROOT / "tools", ROOT / "tests" / "helpers")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("launched_code.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for one in found:
        for key in ("loads", "stores"):
            one[key] = {int(bits): number for bits, number in one[key].items()}
    return found


def narrow(widths):
    return sum(number for bits, number in widths.items() if bits < 128)


def test_a_step_has_all_kernels_of_the_tower_and_around_it(launches):
    assert {one["kernel"] for one in launches} >= OF_ROWS | ON_TENSOR_CORES.keys() | OTHERS


def test_rows_are_loaded_and_stored_128_bits_at_a_time(launches):
    for one in launches:
        if one["kernel"] in OF_ROWS:
            assert one["loads"].get(128) and narrow(one["loads"]) <= NARROW_LOADS.get(one["kernel"], 0), one
            assert narrow(one["stores"]) <= NARROW_STORES.get(one["kernel"], 0), one
        elif one["kernel"] in ON_TENSOR_CORES:
            assert one["loads"].get(128) == ON_TENSOR_CORES[one["kernel"]], one


def test_attention_is_on_tensor_cores(launches):
    for one in launches:
        assert bool(one["tensor cores"]) == (one["kernel"] in ON_TENSOR_CORES), one


def test_nothing_is_in_local_memory(launches):
    assert not [one for one in launches if one["local"]]


def test_bytes_are_those_of_the_arguments(launches):
    """An activation reads 4d numbers of a row and writes them, two bytes each; its gradient reads them twice."""
    warps = {one["kernel"]: one for one in launches if one["kernel"].startswith("activation")}
    for kernel, passes in (("activation_fwd", 2), ("activation_bwd", 3)):
        one = warps[kernel]
        rows = one["warps"] // (2 * 4)  # two programs of four warps a row of 2048
        assert one["bytes"] == rows * 2048 * 2 * passes
        assert one["bandwidth"] == pytest.approx(one["bytes"] / 3.35e12)
        assert one["issue"] == pytest.approx(one["warps"] * one["instructions"] / (132 * 4 * 1.98e9))


LISTING = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/             @!P0  LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32 R4, R8, R6, R4 ;
        /*0040*/                   STL [R1], R4 ;
        /*0050*/              @P0  BRA `(.L_x_0);
        /*0060*/              @P1  BRA `(.L_x_1);
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R4 ;
.L_x_1:
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
.L_x_3:
"""


@pytest.fixture(scope="module")
def machine_code():
    spec = importlib.util.spec_from_file_location("machine_code", ROOT / "tools" / "machine_code.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine_code"] = module  # where its dataclass looks for types
    spec.loader.exec_module(module)
    return module


def test_a_listing_is_read(machine_code):
    code = machine_code.parse(LISTING)
    assert len(code.operations) == 9 and code.loops == ((3, 5),)
    assert code.issued() == 9 and code.issued(trips=3) == 9 + 2 * 3
    assert code.widths("LDG") == {128: 1, 16: 1} and code.widths("STG") == {64: 1}
    assert code.count("HMMA") == code.count("STL") == 1 and code.count("LDL") == 0
    with pytest.raises(ValueError, match="no machine code"):
        machine_code.parse("nothing")
