"""Numbers on their way to the host: order, lag, and that later writes do not reach them."""

from __future__ import annotations

import torch

from cocoop_fast.training.readback import Readback


def test_without_lag_everything_is_read_at_once():
    readback = Readback(0)
    for i in range(3):
        readback.push(torch.tensor([float(i), 0.1], dtype=torch.float64), i)
        assert readback.due() == [(i, [float(i), 0.1])]
    assert readback.rest() == []


def test_with_lag_the_newest_stay_under_way():
    readback, memory, read = Readback(2), torch.zeros(1), []
    for i in range(6):
        memory.fill_(i)  # the same memory each time, as a replayed graph has it
        readback.push(memory, i)
        read += readback.due()
        assert [about for about, _ in read] == list(range(max(0, i - 1)))
    assert readback.rest() == [(4, [4.0]), (5, [5.0])]
    assert all(values == [about] for about, values in read)
    assert readback.rest() == []
