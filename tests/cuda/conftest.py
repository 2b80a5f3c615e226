"""The CUDA kernels' own sources, built for the host and run by the emulator."""

import os

import pytest
from emulated_cuda import build

from cocoop_fast.ops import cuda as cuda_kernels
from cocoop_fast.ops.extensions import CUDA


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The emulated module; tests/cuda/test_sanitizers.py chooses how it is compiled when it runs other tests."""
    flavour = os.environ.get("COCOOP_FAST_EMULATOR", "races")
    return build(tmp_path_factory.mktemp("cuda") / flavour, flavour)


@pytest.fixture
def use(monkeypatch):
    """A function that puts an emulated module in the place of `cocoop_fast._cuda`, and returns its launchers."""

    def use_module(emulated):
        monkeypatch.setattr(CUDA, "_found", emulated.module)
        emulated.set_schedule(0)
        return cuda_kernels

    return use_module


@pytest.fixture
def cuda(built, use):
    """The launchers, on CPU tensors."""
    return use(built)
