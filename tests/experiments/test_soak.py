"""Long runs use no more memory, open files and threads at their end than at their start, and leave no process behind.

What is measured runs in a process of its own: in one with a large heap that other tests have freed, a leak of this run
would be served from there and seen by nobody.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from tiny_runs import tiny_config, use_tiny_clip

from cocoop_fast.experiments.experiment import run
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

    def __init__(self, every: int) -> None:
        self.every = every
        self.memory: list[int] = []
        self.files: list[int] = []
        self.threads: list[int] = []

    def on_step(self, info: Any) -> None:
        if info.step % self.every == 0:
            self.memory.append(resident_bytes())
            self.files.append(open_files())
            self.threads.append(threading.active_count())

    def check(self) -> None:
        """The first quarter warms up."""
        quarter = len(self.memory) // 4
        early, late = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        growth = median(late) - median(early)
        print(
            f"memory {median(early) / 1e6:.1f} -> {median(late) / 1e6:.1f} MB, open files "
            f"{max(self.files[:quarter])} -> {max(self.files[-quarter:])}, threads {max(self.threads[:quarter])} -> "
            f"{max(self.threads[-quarter:])}"
        )
        assert growth < FEW_BYTES, f"memory: {growth / 1e6:.1f} MB more"
        for name, counts in (("files", self.files), ("threads", self.threads)):
            # The thread that looks ahead ends before its epoch.
            assert max(counts[-quarter:]) <= max(counts[quarter : 2 * quarter]), f"{name}: {counts}"


class LeakyGauge(Gauge):
    """Keeps something of each step."""

    def __init__(self, every: int, leak: str) -> None:
        super().__init__(every)
        self.leak, self.kept = leak, []  # type: ignore[var-annotated]

    def on_step(self, info: Any) -> None:
        if self.leak == "memory":
            self.kept.append(bytearray(os.urandom(1_000_000)))
        elif self.leak == "files":
            self.kept.append(os.open(os.devnull, os.O_RDONLY))
        else:
            self.kept.append(threading.Thread(target=threading.Event().wait, daemon=True))
            self.kept[-1].start()
        super().on_step(info)


def soak(folder: Path, steps: int, observer: Observer, **fields: Any) -> None:
    epochs = -(-steps // STEPS_AN_EPOCH)
    config = tiny_config(
        folder, data__shots=16, optim__epochs=epochs, checkpoint_steps=STEPS_AN_EPOCH // 2, **fields
    )
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        run(config, observer=observer)


def soak_in_child(
    answer: SimpleQueue[Gauge], folder: Path, steps: int, make: Callable[..., Gauge], *of: Any
) -> None:
    gauge = make(*of)
    soak(folder, steps, gauge)
    measured = Gauge(gauge.every)  # without what it kept, which cannot be sent
    measured.memory, measured.files, measured.threads = gauge.memory, gauge.files, gauge.threads
    answer.put(measured)


def measure_apart(folder: Path, steps: int, make: Callable[..., Gauge], *of: Any) -> Gauge:
    """The gauge, ``make(*of)``, of a run in a new process."""
    start_anew = multiprocessing.get_context("spawn")
    answer = start_anew.SimpleQueue()
    child = start_anew.Process(target=soak_in_child, args=(answer, folder, steps, make, *of))
    child.start()
    child.join()
    assert child.exitcode == 0
    return answer.get()


@pytest.mark.parametrize("steps", [480, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.soak])])
def test_memory_files_and_threads_stay_flat(tmp_path, steps):
    gauge = measure_apart(tmp_path, steps, Gauge, steps // SAMPLES)
    assert len(gauge.memory) >= SAMPLES
    gauge.check()


@pytest.mark.parametrize("leak", ["memory", "files", "threads"])
def test_the_gauge_notices(tmp_path, leak):
    gauge = measure_apart(tmp_path, STEPS_AN_EPOCH, LeakyGauge, 2, leak)
    with pytest.raises(AssertionError, match=leak):
        gauge.check()


@pytest.mark.parametrize("steps", [160, pytest.param(1600, marks=[pytest.mark.slow, pytest.mark.soak])])
def test_reading_processes_end_with_their_epoch(tmp_path, steps):
    gc.collect()  # what earlier tests left open and nothing holds: closed in between, it would hide a leak
    before = open_files(), threading.active_count()
    children = []

    class Count(Observer):
        def on_step(self, info):
            children.append(len(multiprocessing.active_children()))

    soak(tmp_path, steps, Count(), data__workers=2)
    assert max(children) == 2
    assert multiprocessing.active_children() == []
    gc.collect()
    assert open_files() <= before[0]
    assert threading.active_count() <= before[1]
