"""How many processes read images, if nothing is said."""

from __future__ import annotations

import pytest
import torch

from cocoop_fast.data import workers
from cocoop_fast.data.workers import reading_processes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    "wanted, device, cores, ranks, expected",
    [
        (None, GPU, 16, None, 8),
        (None, GPU, 4, None, 3),
        (None, GPU, 16, "4", 3),  # ranks share the cores of a host
        (None, GPU, 1, None, 0),
        (None, GPU, 1, "8", 0),
        (None, GPU, 4, "zero", 3),
        (None, CPU, 16, None, 0),  # its cores compute
        (2, CPU, 16, None, 2),
        (0, GPU, 16, None, 0),
    ],
)
def test_enough_to_feed_a_gpu(monkeypatch, wanted, device, cores, ranks, expected):
    monkeypatch.setattr(workers, "_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert reading_processes(wanted, device) == expected


def test_the_cores_are_those_of_this_process():
    assert workers._cores() >= 1
