"""Whatever befalls a run: it says what, in one sentence, and what was learned is kept."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import At, StopAfter, assert_same_ends, tiny_config, use_tiny_clip, write_images
from tiny_training import Recorder

from cocoop_fast import UserError
from cocoop_fast.cli import failures
from cocoop_fast.data import load_dataset
from cocoop_fast.experiments.experiment import evaluate_run, run
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.experiments.reference_import import export_checkpoint
from cocoop_fast.runs import checkpoint
from cocoop_fast.runs.directory import read_run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")


@pytest.fixture
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


# Disks


def test_a_full_disk(tmp_path, tiny):
    """The third checkpoint is larger than files may be; the logs are not."""
    config = tiny_config(tmp_path / "run", checkpoint_steps=4)
    folder = tmp_path / "run" / "checkpoints"
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = At(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, most)))
    try:
        with pytest.raises(UserError, match=r"step-0000000008.pt cannot be written \(.*make room") as error:
            run(config, observer=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert error.value.exit_status == 1 and full.steps[-1] == 8
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000000000.pt", "step-0000000004.pt"]
    run(config)  # there is room again
    run(tiny_config(tmp_path / "whole"))
    assert_same_ends(tmp_path / "run", tmp_path / "whole")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="root alone makes devices")
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_log_on_a_full_disk(tmp_path, tiny, name):
    config, log = tiny_config(tmp_path / "run", print_freq=1), tmp_path / "run" / name

    def fill():
        log.rename(tmp_path / "kept")
        os.mknod(log, stat.S_IFCHR | 0o600, os.stat("/dev/full").st_rdev)

    full = rf"No space left on device \(.*/{name}\); free some space and run the same command again"
    with pytest.raises(UserError, match=full) as error:
        run(config, observer=At(3, fill))
    assert error.value.exit_status == failures.FAILED
    (tmp_path / "kept").replace(log)
    assert len(run(config).rows) == 1


@pytest.mark.parametrize(
    "changes", [{}, {"checkpoint_steps": 1}, {"print_freq": 1}, {"data__cache_views": 2}]
)
def test_a_run_directory_that_is_deleted_underway(tmp_path, tiny, changes):
    """The run ends, and makes nothing that would look like another run."""
    path = tmp_path / "run"
    config = tiny_config(path, **changes)
    with pytest.raises(UserError, match=rf"{path} was deleted or replaced while the run went on") as error:
        run(config, compare=("coop",), observer=At(6, lambda: shutil.rmtree(path)))
    assert error.value.exit_status == 1 and not path.exists()
    assert len(run(config).rows) == 1


def test_a_deletion_that_was_raced_by_a_checkpoint(tmp_path, tiny):
    """`rm -rf` cannot remove a folder that something was written into meanwhile."""
    path = tmp_path / "run"
    config = tiny_config(path, checkpoint_steps=4)

    def delete():
        for entry in path.iterdir():
            if entry.name != "checkpoints":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (path / "checkpoints" / "step-0000000000.pt").unlink()

    with pytest.raises(UserError, match="was deleted or replaced while the run went on"):
        run(config, observer=At(5, delete))
    assert not path.exists()
    run(config)
    with pytest.raises(UserError, match="was deleted or replaced while the run went on"):
        run(config, overwrite=True, observer=At(5, (path / "config.yaml").unlink))
    assert len(list(path.glob("checkpoints/*.pt"))) == 2  # somebody deleted one file, not the run


@pytest.mark.parametrize("changes", [{"print_freq": 1}, {"checkpoint_steps": 1}])
def test_a_slow_deletion(tmp_path, tiny, changes):
    """Logs and checkpoints go first, the rest while the run looks for them."""
    path = tmp_path / "run"

    def delete():
        for name in ("log.txt", "metrics.jsonl"):
            (path / name).unlink()
        shutil.rmtree(path / "checkpoints")
        threading.Timer(0.2, shutil.rmtree, [path]).start()

    with pytest.raises(UserError, match="was deleted or replaced while the run went on"):
        run(tiny_config(path, **changes), observer=At(6, delete))
    assert not path.exists()


def test_a_log_alone_may_be_deleted(tmp_path, tiny):
    path = tmp_path / "run"
    run(tiny_config(path, print_freq=1), observer=At(6, (path / "log.txt").unlink))
    assert "epoch [2/2] batch [10/10]" in (path / "log.txt").read_text()


def test_a_run_directory_that_is_replaced_underway(tmp_path, tiny):
    path = tmp_path / "run"

    def replace_directory():
        path.rename(tmp_path / "moved")
        path.mkdir()
        (path / "config.yaml").write_text("another run's")

    config = tiny_config(path)
    with pytest.raises(UserError, match="was deleted or replaced while the run went on"):
        run(config, observer=At(6, replace_directory))
    assert [one.name for one in path.iterdir()] == ["config.yaml"]
    shutil.rmtree(path)
    (tmp_path / "moved").rename(path)
    assert len(run(config).rows) == 1


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


def test_what_is_not_finite_is_refused_wherever_it_is_read(tmp_path, tiny):
    """Evaluation, prediction, export and going on; with one checkpoint that is finite, that one is used."""
    folder = tmp_path / "run"
    config = tiny_config(folder, checkpoint_steps=4)
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=StopAfter(10))
    paths = sorted((folder / "checkpoints").glob("*.pt"))
    whole = [path.read_bytes() for path in paths]

    def spoil(path):
        content = torch.load(path, weights_only=True)
        for value in content["parameters"].values():
            value.fill_(float("nan"))
        torch.save(content, path)

    spoil(paths[-1])
    with pytest.warns(UserWarning, match=rf"not finite in `.*Using {paths[0].name} instead"):
        assert read_run(folder)[1].step == 4
    spoil(paths[0])
    for read in (
        lambda: evaluate_run(folder),
        lambda: Predictor.from_run(folder),
        lambda: export_checkpoint(folder),
        lambda: run(config),
    ):
        with pytest.raises(UserError, match=rf"{paths[-1].name} has values that are not finite") as error:
            read()
        assert error.value.exit_status == 1
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    run(config)
    assert read_run(folder)[1].step == 20


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
    assert "step-0000000008.pt is damaged" in observer.messages[1]
    assert "Using step-0000000004.pt instead" in observer.messages[1] and observer.steps[0] == 5
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


def test_a_killed_reading_process_is_explained():
    sentence, status = failures.explain(
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    )
    assert sentence.startswith("a process that reads images ended unexpectedly") and status == 1


def test_a_stopped_run_may_go_on_by_skipping(tmp_path, tiny):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(tmp_path), observer=StopAfter(3))
    run(tiny_config(tmp_path, optim__on_nonfinite="skip"))
