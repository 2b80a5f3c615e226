"""The processor's own limits: the loops do what they count, and nothing that is measured is above them."""

from __future__ import annotations

import time

import pytest
import torch

from cocoop_fast.measure.peak import READ_BYTES, PeakLoops
from cocoop_fast.measure.timing import interleave
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP

pytestmark = pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")


@pytest.fixture(params=cpu.available_isas() if CPP.why_unavailable() is None else [])
def isa(request):
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def test_reading_reads_everything(isa):
    for n in (1, 15, 64, 100_003):
        data = torch.arange(n) % 7
        assert cpu.read_loop(data.float()) == int(data.sum())
    with pytest.raises(ValueError, match="`data` must have one dimension"):
        cpu.read_loop(torch.zeros(2, 2))


def test_the_multiply_adds_are_counted_and_done(isa):
    lanes = {"portable": 4, "avx2": 8, "avx512": 16, "neon": 4}[isa]
    chains = {"portable": 12, "avx2": 12, "avx512": 24, "neon": 24}[isa]
    threads = torch.get_num_threads()
    assert cpu.multiply_add_loop(1000) == 2 * chains * lanes * 1000 * threads

    def seconds(rounds):
        times = []
        for _ in range(5):
            before = time.process_time()
            cpu.multiply_add_loop(rounds)
            times.append(time.process_time() - before)
        return min(times)

    # Ten times the rounds take about ten times the processor time: no compiler has folded them.
    assert 5 < seconds(3_000_000) / seconds(300_000) < 20
    with pytest.raises(ValueError, match="`rounds` must be at least 1"):
        cpu.multiply_add_loop(0)


def test_no_product_is_faster_than_the_peak():
    x, out = torch.ones(2, 512, 512)
    loops = PeakLoops()
    actions = {"product": lambda: torch.mm(x, x, out=out), **loops.actions}
    for action in actions.values():
        action()
    timings = interleave(actions, rounds=4, max_seconds=5, clock=time.process_time)
    peak = loops.peak(timings)
    assert 2 * 512**3 / timings["product"].best < 1.1 * peak.flops
    assert READ_BYTES / peak.read_bandwidth == pytest.approx(timings["reading"].best)
