"""This machine measured: what is measured of it, and the memory that is predicted. Times are in benchmarks/test_plan.py."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from cocoop_fast.errors import UserError
from cocoop_fast.measure import this_machine as measure
from cocoop_fast.measure.cost import Product, RowKernel, TreeCost, layout_on
from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names
from cocoop_fast.measure.this_machine import Machine, measure_cpu, measure_rates, use_threads
from cocoop_fast.ops.extensions import CPP

ROOT = Path(__file__).parents[2]

needs_extension = pytest.mark.skipif(
    CPP.why_unavailable() is not None, reason="the C++ extension is not built"
)

MACHINE = Machine(
    name="made up",
    threads=1,
    memory_bytes=10**9,
    products={(512, 512, False): ((10, 1e9), (1000, 3e9)), (512, 512, True): ((100, 2e9),)},
    kernels={"layer_norm_fwd": 1e8},
    copy_bandwidth=4e9,
    fresh_bandwidth=1e9,
)


@pytest.fixture(scope="module")
def check_plan():
    """tools/check_plan.py, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("check_plan", ROOT / "tools" / "check_plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_plan"] = module
    spec.loader.exec_module(module)
    return module


@needs_extension
@pytest.mark.slow
def test_the_predicted_memory_is_what_is_used(check_plan):
    predicted, measured = check_plan.check_memory(ProblemSpec(imagenet_names(60), batch=2))
    assert predicted == pytest.approx(measured, rel=0.15)


@needs_extension
def test_everything_that_a_step_does_is_measured():
    problem = build_problem(ProblemSpec(imagenet_names(5), model="demo"))
    tick = 2.0**-10
    ticks = itertools.count()
    machine = measure_cpu(problem.weights, problem.tree, 1, rounds=1, clock=lambda: tick * next(ticks))
    for operation in TreeCost(problem.weights, problem.tree, layout_on("cpu")).step(1).operations:
        if isinstance(operation, Product):
            assert measure.shape_of(operation) in machine.products
        else:
            assert operation.kind in machine.kernels or operation.kind in (
                "move_rows",
                "assemble_prompts_fwd",
                "assemble_prompts_bwd",
            )
        assert 0 < machine.seconds(operation, 4) < 1
    assert machine.copy_bandwidth == machine.fresh_bandwidth == 2 * measure.COPY_BYTES / tick


def test_rates_between_measured_rows_are_interpolated():
    assert MACHINE.gemm_rate(Product(10, 512, 512)) == 1e9
    assert MACHINE.gemm_rate(Product(100, 512, 512)) == pytest.approx(2e9)
    assert MACHINE.gemm_rate(Product(1, 512, 512)) == 1e9
    assert MACHINE.gemm_rate(Product(9, 512, 512, backward=True)) == 2e9
    assert MACHINE.gemm_rate(Product(9, 7, 512)) == MACHINE.best_rate == 3e9


def test_kernels_take_their_own_rate_and_everything_else_the_bandwidth():
    assert MACHINE.seconds(RowKernel("layer_norm_fwd", 1e8), 4) == 1
    assert MACHINE.seconds(RowKernel("copy", 1e9), 4) == 1
    assert MACHINE.seconds(RowKernel("eager_fwd", 1e9), 4, eager=True) == 4
    assert MACHINE.seconds(RowKernel("image_encoder", 0.0, flops=6e9), 4) == 2


def test_threads_are_set_for_a_while_only():
    before = torch.get_num_threads()
    with use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with use_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_without_the_extension_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(CPP, "_found", "it was not built")
    problem = build_problem(ProblemSpec(imagenet_names(2), model="demo"))
    with pytest.raises(UserError, match="build it, or name a --device of the table"):
        measure_cpu(problem.weights, problem.tree, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_is_measured():
    from cocoop_fast.measure.this_machine import measure_gpu

    found = measure_gpu("fp16")
    assert found.seconds(Product(4096, 4096, 4096), 2) < 0.1


def test_rates_are_those_of_the_given_device():
    flops, bandwidth = measure_rates(torch.device("cpu"), torch.float32, side=128, copy_elements=1 << 16)
    assert 1e8 < flops < 1e13 and 1e8 < bandwidth < 1e12
