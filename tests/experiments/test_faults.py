"""Whatever befalls a run: it says what, in one sentence, and what was learned is kept."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparison import assert_close
from tiny_runs import StopAfter, tiny_config, use_tiny_clip, write_images
from tiny_training import Recorder, fast_model, large_model, make_batches, run_out_of_memory

from cocoop_fast import UserError, cli
from cocoop_fast.cli import failures
from cocoop_fast.config import OptimConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.experiments.experiment import run
from cocoop_fast.runs import checkpoint
from cocoop_fast.runs.directory import read_run
from cocoop_fast.runs.log import RunLog
from cocoop_fast.training.observer import Observer
from cocoop_fast.training.trainer import Trainer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and permissions of POSIX")


@pytest.fixture
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


class At(Observer):
    """Does something after one step, and remembers what was said."""

    def __init__(self, step, action):
        self.step, self.action, self.messages, self.steps = step, action, [], []

    def on_message(self, text):
        self.messages.append(text)

    def on_step(self, info):
        self.steps.append(info.step)
        if info.step == self.step:
            self.action()


def assert_same_ends(one, other):
    """The learned parameters, and the optimizer with its momentum, bit for bit."""
    (_, a), (_, b) = read_run(one), read_run(other)
    assert a.step == b.step and a.parameters.keys() == b.parameters.keys()
    assert all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)
    for ours, theirs in zip(a.optimizer["state"].values(), b.optimizer["state"].values(), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


# Signals


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
from tiny_training import fast_model, make_batches
from cocoop_fast.config import OptimConfig
from cocoop_fast.training.trainer import Trainer
trainer = Trainer(fast_model(), make_batches(10, 1), OptimConfig(epochs=1))
step = trainer._step
def slow(*args):
    os.write(1, b".")
    time.sleep(30)
    return step(*args)
trainer._step = slow
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
        trainer = Trainer(fast_model(), make_batches(5, 1), OptimConfig(epochs=1), observer=observer)
        trainer.fit()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert trainer.step == 5


# Disks


def test_a_full_disk(tmp_path, tiny):
    """The third checkpoint goes to a device that is always full."""
    config = tiny_config(tmp_path / "run", checkpoint_steps=4)
    folder = tmp_path / "run" / "checkpoints"
    full = At(6, lambda: (folder / ".step-0000000008.pt.tmp").symlink_to("/dev/full"))
    with pytest.raises(UserError, match=r"step-0000000008.pt cannot be written \(.*make room") as error:
        run(config, observer=full)
    assert error.value.exit_status == 1 and full.steps[-1] == 8
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000000000.pt", "step-0000000004.pt"]
    run(config)  # there is room again
    run(tiny_config(tmp_path / "whole"))
    assert_same_ends(tmp_path / "run", tmp_path / "whole")


def test_a_log_on_a_full_disk(tmp_path, tiny, capsys):
    (tmp_path / "run").mkdir()
    arguments = ["train", "-q", "--shots", "1", "--no-compare", "--epochs", "1", "-o", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "_record", lambda *args, **values: Path("/dev/full").write_text("x" * 10_000))
        assert cli.run(arguments) == failures.FAILED
    said = capsys.readouterr().err
    assert "No space left on device; free some space and run the same command again" in said
    assert cli.run(arguments) == failures.DONE


@pytest.fixture
def not_root():
    """Permissions bind everybody but root: become somebody else meanwhile."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_directory(tiny, not_root):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o500)
        observer = Recorder()
        with pytest.raises(
            UserError, match=r"output directory .* cannot be used: Permission denied"
        ) as error:
            run(tiny_config(Path(folder) / "run"), observer=observer)
        assert error.value.exit_status == 1 and not observer.steps
        os.chmod(folder, 0o700)


def test_a_directory_that_becomes_read_only(tiny, not_root):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny_config(folder / "run", checkpoint_steps=4)
        saved = folder / "run" / "checkpoints"
        with pytest.raises(UserError, match=r"step-0000000008.pt cannot be written \(.*Permission denied"):
            run(config, observer=At(6, lambda: saved.chmod(0o500)))
        saved.chmod(0o700)
        assert read_run(folder / "run")[1].step == 4
        run(config)
        assert read_run(folder / "run")[1].step == 20


@pytest.mark.parametrize("damage", ["torn", "altered", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, tiny, damage):
    config = tiny_config(tmp_path / "run", checkpoint_steps=4)
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=StopAfter(9))
    newest = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    whole = newest.read_bytes()
    place = whole.index(checkpoint.load(newest).parameters["ctx"].numpy().tobytes()[:16])
    newest.write_bytes(
        {
            "torn": whole[: len(whole) // 2],
            "altered": whole[:place] + b"\x7f" + whole[place + 1 :],
            "empty": b"",
        }[damage]
    )
    observer = At(0, lambda: None)
    run(config, observer=observer)
    assert "step-0000000008.pt is damaged" in observer.messages[0]
    assert "Using step-0000000004.pt instead" in observer.messages[0] and observer.steps[0] == 5
    run(tiny_config(tmp_path / "whole"))
    assert_same_ends(tmp_path / "run", tmp_path / "whole")


# Images


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes(tmp_path, tiny, workers):
    """Found missing by the second epoch: the first is over, and nothing of it is lost."""
    for name in "abcd":
        write_images(tmp_path / "data" / name, 6)
    config = tiny_config(
        tmp_path / "run", data__name="folder", data__root=str(tmp_path / "data"), data__workers=workers,
        optim__epochs=3,
    )  # fmt: skip
    lost = tmp_path / "data" / str(load_dataset(config.data).train[0].source)
    hidden = tmp_path / "hidden"
    first_epoch = 4
    with pytest.raises(
        UserError, match=rf"image a/{lost.name} in .* can no longer be read \(missing\)"
    ) as error:
        run(config, observer=At(first_epoch, lambda: lost.rename(hidden)))
    assert error.value.exit_status == 1
    assert read_run(tmp_path / "run")[1].step >= first_epoch
    hidden.rename(lost)
    run(config)
    run(replace(config, output_dir=tmp_path / "whole"))
    assert_same_ends(tmp_path / "run", tmp_path / "whole")


def test_what_was_learned_is_saved_before_an_unreadable_image_ends_the_run():
    saved = []
    trainer = Trainer(fast_model(), make_batches(40, 1), OptimConfig(epochs=1))

    class Batches(type(trainer.batches)):
        def epoch(self, *position):
            for number, batch in enumerate(super().epoch(*position)):
                if number == 20:
                    raise UserError("gone")
                yield batch

    trainer._features._batches = Batches(**trainer.batches.__dict__)
    with pytest.raises(UserError, match="gone"):
        trainer.fit(save=lambda: saved.append(trainer.step))
    assert saved == [trainer.step] and 0 < trainer.step <= 20


def test_a_killed_reading_process_is_explained():
    sentence, status = failures.explain(
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    )
    assert sentence.startswith("a process that reads images ended unexpectedly") and status == 1


# Numbers


def broken_at(trainer, steps, where):
    """Let the loss or the gradient of some 1-based steps be infinite or not a number."""
    step, calls = trainer._step, []

    def breaking(features, label):
        calls.append(label)
        result = step(features, label)
        if len(calls) in steps:
            if where == "loss":
                result.report[0] = math.nan
            else:
                result.gradients[0][0, 0] = math.inf
                result.report[3] = math.inf
        return result

    trainer._step = breaking
    return trainer


def trainer_of(observer=None, images=12, **optim):
    return Trainer(fast_model(), make_batches(images, 1), OptimConfig(**optim), observer=observer)


@pytest.mark.parametrize(
    ("where", "what"),
    [("loss", "The loss became nan"), ("gradient", r"The gradient became inf, although the loss is [\d.]+,")],
)
def test_a_number_that_is_not_finite_names_step_sample_and_remedy(where, what):
    trainer, saved = broken_at(trainer_of(epochs=2), {15}, where), []
    sample = list(trainer.batches.epoch(2))[2].sample.item()
    before = []
    trainer.observer.on_step = lambda info: before.append(
        [p.detach().clone() for p in trainer.model.prompt_learner.parameters()]
    )
    with pytest.raises(
        UserError,
        match=rf"{what} at step 15 \(epoch 2\), on {sample}; try a lower learning rate, or .*--on-nonfinite skip",
    ) as error:
        trainer.fit(save=lambda: saved.append(trainer.step))
    assert error.value.exit_status == 1 and saved == [12] and trainer.step == 14
    for ours, theirs in zip(trainer.model.prompt_learner.parameters(), before[-1], strict=True):
        assert torch.equal(ours, theirs)  # the broken step left no trace


def test_the_report_has_the_gradients_largest_value():
    trainer = trainer_of(epochs=1)
    encoded = next(iter(trainer._features.epoch(1)))
    result = trainer._step(encoded.features, encoded.label)
    assert result.report[3] == max(one.abs().max() for one in result.gradients)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skipped_steps_change_nothing_and_are_counted(where):
    recorder = Recorder()
    heard = []
    recorder.on_message = heard.append
    trainer = broken_at(trainer_of(recorder, epochs=1, on_nonfinite="skip"), {2, 3, 12}, where)
    trainer.fit()
    assert trainer.step == 12 and [info.step for info in recorder.steps] == [1, *range(4, 12)]
    assert recorder.epochs[0].skipped_steps == trainer.scaler.skipped == 3
    assert math.isfinite(recorder.epochs[0].loss)
    assert (
        len(heard) == 3
        and "at step 2 (epoch 1), on " in heard[0]
        and heard[0].endswith("the step is skipped.")
    )
    # The same as a trainer that never meets those samples.
    other = trainer_of(epochs=1)
    for number, encoded in enumerate(list(other._features.epoch(1)), 1):
        if number not in (2, 3, 12):
            result = other._step(encoded.features, encoded.label)
            for group in other.optimizer.param_groups:
                group["lr"] = 1e-5
            for parameter, gradient in zip(other._parameters, result.gradients, strict=True):
                parameter.grad = gradient
            other.scaler.step(other.optimizer)
    for ours, theirs in zip(trainer._parameters, other._parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_without_finite_steps_gives_up():
    trainer = broken_at(trainer_of(epochs=2, on_nonfinite="skip"), set(range(5, 99)), "loss")
    with pytest.raises(UserError, match=r"at step 14 .* and so it was in the 9 steps before; try a lower"):
        trainer.fit()


def test_an_image_without_finite_features_is_named():
    trainer = Trainer(fast_model(), make_batches(12, 4), OptimConfig(epochs=1))
    bad = list(trainer.batches.epoch(1))[1].sample[2].item()
    read = trainer._features.epoch

    def with_a_bad_one(*position):
        for encoded in read(*position):
            features = encoded.features.clone()
            features[encoded.batch.sample == bad, 5] = math.nan
            yield encoded._replace(features=features)

    trainer._features.epoch = with_a_bad_one
    with pytest.raises(
        UserError, match=rf"image features are NaN or infinite at step 2 \(epoch 1\), on {bad};"
    ):
        trainer.fit()


def test_a_stopped_run_may_go_on_by_skipping(tmp_path, tiny):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(tmp_path), observer=StopAfter(3))
    run(tiny_config(tmp_path, optim__on_nonfinite="skip"))


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
    ids=["host", "gpu", "torch on the host"],
)
def test_a_step_without_memory_is_repeated_in_smaller_pieces(monkeypatch, error):
    parameters = []
    for times in (0, 2):
        observer = At(0, lambda: None)
        trainer = Trainer(large_model(), make_batches(24, 4), OptimConfig(epochs=1), observer=observer)
        run_out_of_memory(monkeypatch, trainer.model, error, times)
        trainer.fit()
        monkeypatch.undo()
        assert observer.steps == list(range(1, 7))
        assert len(observer.messages) == (1 if times else 0)
        parameters.append([p.detach() for p in trainer._parameters])
    assert "used up at step 1. It is repeated" in observer.messages[0]
    encoder = trainer.model.tree_encoder
    pieces = encoder.memory.pieces(encoder._current_tower(deep=False), 4, keeps=True)
    assert pieces.images == 1 and len(pieces.shards) > 1
    for ours, theirs in zip(*parameters, strict=True):
        assert_close(ours, theirs, 1e-6)


def test_a_step_that_never_fits_gives_up(monkeypatch):
    trainer = Trainer(fast_model(), make_batches(24, 4), OptimConfig(epochs=1))
    run_out_of_memory(monkeypatch, trainer.model, MemoryError(), 10**6)
    with pytest.raises(
        UserError, match=r"used up at step 1, however small .*use a smaller batch size"
    ) as error:
        trainer.fit()
    assert error.value.exit_status == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    trainer = Trainer(fast_model(), make_batches(4, 1), OptimConfig(epochs=1))
    run_out_of_memory(monkeypatch, trainer.model, RuntimeError("shapes do not match"), 1)
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.fit()
