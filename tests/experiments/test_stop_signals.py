"""SIGINT and SIGTERM: the step is finished and saved; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import At, assert_same_ends, tiny_config, use_tiny_clip
from tiny_training import fast_model, make_batches, recipe

from cocoop_fast import cli
from cocoop_fast.experiments.experiment import run
from cocoop_fast.runs.directory import read_run
from cocoop_fast.runs.log import RunLog
from cocoop_fast.training.trainer import Trainer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


@pytest.mark.parametrize(
    ("which", "ending", "status"),
    [(signal.SIGTERM, SystemExit, 0), (signal.SIGINT, KeyboardInterrupt, 130)],
)
@pytest.mark.parametrize("step", [3, 10, 20])  # within an epoch, at its end, at the run's
def test_a_signal_finishes_the_step_and_saves(tmp_path, tiny, which, ending, status, step):
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    observer = At(step, lambda: os.kill(os.getpid(), which))
    with pytest.raises(ending) as raised:
        run(tiny_config(tmp_path / "stopped"), observer=observer)
    if ending is SystemExit:
        assert raised.value.code == status
    assert observer.steps == list(range(1, step + 1))
    assert observer.messages[-1].startswith(f"Stopped by {which.name} after step {step};")
    assert read_run(tmp_path / "stopped")[1].step == step
    assert {one: signal.getsignal(one) for one in before} == before
    run(tiny_config(tmp_path / "stopped"))
    run(tiny_config(tmp_path / "whole"))
    assert_same_ends(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize(("which", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_exit_status_of_the_command(tmp_path, tiny, monkeypatch, capsys, which, status):
    on_step = RunLog.on_step

    def and_a_signal(log, info):
        on_step(log, info)
        if info.step == 2:
            os.kill(os.getpid(), which)

    monkeypatch.setattr(RunLog, "on_step", and_a_signal)
    assert cli.run(["train", "--shots", "1", "--no-compare", "--epochs", "2", "-o", str(tmp_path)]) == status
    said = capsys.readouterr().err
    assert f"Stopped by {which.name} after step 2" in said and ("error" in said) == (status != 0)
    assert read_run(tmp_path)[1].step == 2


SLOW_STEPS = """
import os, sys, time
from tiny_training import Wrapped, fast_model, make_batches, recipe
from cocoop_fast.training.trainer import Trainer
def slow(loss_and_logits, *args):
    os.write(1, b".")
    time.sleep(30)
    return loss_and_logits(*args)
trainer = Trainer(Wrapped(fast_model(), slow), make_batches(10, 1), recipe())
trainer.fit(save=lambda: os.write(1, b"saved"))
"""


READING_PROCESSES = """
import os, sys, time
from pathlib import Path
import pytest
from tiny_runs import tiny_config, use_tiny_clip
from cocoop_fast.experiments.experiment import run
from cocoop_fast.training.observer import Observer
class Tell(Observer):
    def on_step(self, info):
        os.write(1, b".")
        time.sleep(0.05)
use_tiny_clip(pytest.MonkeyPatch())
run(tiny_config(Path(sys.argv[1]), data__workers=2, optim__epochs=50), observer=Tell())
"""


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_run_is_saved_too(tmp_path, which):
    """As a terminal and a scheduler send it: those that read images leave it to the one that trains."""
    tests = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", READING_PROCESSES, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests / "helpers"), str(tests.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        for _ in range(13):
            assert process.stdout.read(1) == b"."
        os.killpg(process.pid, which)
        said, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (0 if which == signal.SIGTERM else -which), error
    assert read_run(tmp_path)[1].step == 13 + len(said)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(which):
    tests = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests / "helpers"), str(tests.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout.read(1) == b"."
        process.send_signal(which)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)  # the step goes on
        process.send_signal(which)
        said, _ = process.communicate(timeout=10)
    finally:
        process.kill()
    assert said == b"" and process.returncode in (-which, 1)  # 1: Python's own way of ending on SIGINT


def test_a_signal_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        observer = At(2, lambda: os.kill(os.getpid(), signal.SIGINT))
        trainer = Trainer(fast_model(), make_batches(5, 1), recipe(), observer=observer)
        trainer.fit()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert trainer.step == 5
