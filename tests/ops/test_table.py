"""Which backend serves."""

from __future__ import annotations

import pytest
import torch

from cocoop_fast.ops.table import select_backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_is_served_by_triton_unless_cuda_is_asked_for(dtype):
    pytest.importorskip("triton")
    assert select_backend(torch.device("cuda"), dtype).name == "triton"


def test_float64_is_plain_torch_everywhere():
    for device in ("cpu", "cuda"):
        assert select_backend(torch.device(device), torch.float64).name == "torch"
