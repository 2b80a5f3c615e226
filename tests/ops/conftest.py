"""The C++ kernels under each instruction set that this machine runs."""

import pytest
import torch

from cocoop_fast.ops import cpu as cpu_kernels
from cocoop_fast.ops.extensions import CPP

ISAS = cpu_kernels.available_isas() if CPP.why_unavailable() is None else ["portable"]


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once for each instruction set, and leaves the widest chosen."""
    if reason := CPP.why_unavailable():
        pytest.skip(reason)
    cpu_kernels.set_isa(request.param)
    yield request.param
    cpu_kernels.set_isa(ISAS[-1])


@pytest.fixture
def widest_isa():
    """The widest instruction set, for tests that need no other."""
    if reason := CPP.why_unavailable():
        pytest.skip(reason)
    cpu_kernels.set_isa(cpu_kernels.available_isas()[-1])


@pytest.fixture
def threads():
    """A function that sets the number of threads; restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def extension_built():
    """For hypothesis, whose examples share the fixtures of one test."""
    if reason := CPP.why_unavailable():
        pytest.skip(reason)
