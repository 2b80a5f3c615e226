"""Long runs use no more memory, open files and threads at their end than at their start, and leave no process behind."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path
from statistics import median

import pytest
from tiny_runs import tiny_config, use_tiny_clip

from cocoop_fast.training.experiment import run
from cocoop_fast.training.observer import Observer

PROCESS = Path("/proc/self")

pytestmark = pytest.mark.skipif(not PROCESS.exists(), reason="memory and open files are read from /proc")

STEPS_AN_EPOCH = 80
SAMPLES = 40
# What a run may grow by between its first and its second half: a few pages of allocators and caches, whatever its length.
FEW_BYTES = 3_000_000


def resident_bytes() -> int:
    return int((PROCESS / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir(PROCESS / "fd"))


class Gauge(Observer):
    """Measures the process every so many steps."""

    def __init__(self, every):
        self.every, self.memory, self.files, self.threads = every, [], [], []

    def on_step(self, info):
        if info.step % self.every == 0:
            self.memory.append(resident_bytes())
            self.files.append(open_files())
            self.threads.append(threading.active_count())

    def check(self):
        """The first quarter warms up."""
        quarter = len(self.memory) // 4
        early, late = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        growth = median(late) - median(early)
        print(
            f"memory {median(early) / 1e6:.1f} -> {median(late) / 1e6:.1f} MB, open files "
            f"{max(self.files[:quarter])} -> {max(self.files[-quarter:])}, threads {max(self.threads[:quarter])} -> "
            f"{max(self.threads[-quarter:])}"
        )
        assert growth < FEW_BYTES, f"{growth / 1e6:.1f} MB more"
        for counts in (self.files, self.threads):  # the thread that looks ahead ends before its epoch
            assert max(counts[-quarter:]) <= max(counts[quarter : 2 * quarter]), counts


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


def soak(folder, steps, observer, **fields):
    epochs = -(-steps // STEPS_AN_EPOCH)
    run(
        tiny_config(
            folder, data__shots=16, optim__epochs=epochs, checkpoint_steps=STEPS_AN_EPOCH // 2, **fields
        ),
        observer=observer,
    )


@pytest.mark.parametrize("steps", [480, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.soak])])
def test_memory_files_and_threads_stay_flat(tmp_path, steps):
    gauge = Gauge(steps // SAMPLES)
    soak(tmp_path, steps, gauge)
    assert len(gauge.memory) >= SAMPLES
    gauge.check()


@pytest.mark.parametrize("steps", [160, pytest.param(1600, marks=[pytest.mark.slow, pytest.mark.soak])])
def test_reading_processes_end_with_their_epoch(tmp_path, steps):
    before = open_files(), threading.active_count()
    children = []

    class Count(Observer):
        def on_step(self, info):
            children.append(len(multiprocessing.active_children()))

    soak(tmp_path, steps, Count(), data__workers=2)
    assert max(children) == 2
    assert multiprocessing.active_children() == []
    assert (open_files(), threading.active_count()) == before


@pytest.mark.parametrize("leak", ["memory", "files", "threads"])
def test_the_gauge_notices(tmp_path, leak):
    kept, done = [], threading.Event()
    gauge = Gauge(2)

    class Leaky(Observer):
        def on_step(self, info):
            if leak == "memory":
                kept.append(bytearray(os.urandom(1_000_000)))
            elif leak == "files":
                kept.append(os.open(os.devnull, os.O_RDONLY))
            else:
                kept.append(threading.Thread(target=done.wait, daemon=True))
                kept[-1].start()
            gauge.on_step(info)

    try:
        soak(tmp_path, STEPS_AN_EPOCH, Leaky())
        with pytest.raises(AssertionError):
            gauge.check()
    finally:
        done.set()
        for one in kept:
            if leak == "files":
                os.close(one)
            elif leak == "threads":
                one.join()
