"""Run directories: whose they are, and that nothing in them is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from tiny_runs import tiny_config

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig, load_yaml, resolved_from_mapping
from cocoop_fast.data import load_dataset
from cocoop_fast.runs.directory import open_run, read_run
from cocoop_fast.runs.recipe import resolve


def config(path, **fields):
    return resolve(tiny_config(path, **fields), load_dataset(DataConfig()))


def test_the_configuration_is_kept_in_full(tmp_path):
    wanted = config(tmp_path / "deep" / "run", optim__lr=1e-5)
    with open_run(wanted) as directory:
        assert resolved_from_mapping(load_yaml(directory.path / "config.yaml")) == wanted
        assert directory.results() is None
        directory.write_results({"rows": [1]})
        kept = directory.results()
        assert kept.pop("provenance").keys() >= {"cocoop_fast", "torch", "commit", "command", "date"}
        assert kept == {"rows": [1]}


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 2), ("optim__lr", 0.5), ("data__shots", 4), ("prompt__method", "coop"), ("augment__flip", 0.5)],
)
def test_another_configuration_is_refused(tmp_path, field, value):
    with open_run(config(tmp_path)):
        pass
    name = field.replace("__", ".")
    with (
        pytest.raises(UserError, match=rf"another configuration \(.*{name} is .* there and {value!r} here"),
        open_run(config(tmp_path, **{field: value})),
    ):
        pass
    with open_run(config(tmp_path, **{field: value}), overwrite=True):
        pass


def test_how_it_is_computed_and_shown_may_change(tmp_path):
    with open_run(config(tmp_path)):
        pass
    other = config(tmp_path, print_freq=3, checkpoint_steps=7, data__workers=2, eval_batch_size=5)
    with open_run(replace(other, model=replace(other.model, backend="torch"))):
        pass


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "log.txt").write_text("somebody's log")
    for overwrite in (False, True):
        with (
            pytest.raises(UserError, match=r"already has log.txt but no config.yaml"),
            open_run(config(tmp_path), overwrite=overwrite),
        ):
            pass
    assert (tmp_path / "log.txt").read_text() == "somebody's log"


OURS = (
    "results.json", "log.txt", "metrics.jsonl", ".results.json.tmp", "checkpoints/step-0000000001.pt",
    "checkpoints/.step-0000000002.pt.tmp", "few_shot/shot_2-seed_1-0a1b.json", "prompt_learner/checkpoint",
    "prompt_learner/model.pth.tar-10", "views/view1-0123456789abcdef01234567.safetensors", "test_new/log.txt",
    "test_dtd/results.json", "tensorboard/events.out.tfevents.1.host.2.0",
)  # fmt: skip
FOREIGN = (
    "notes.md", "test_utils.py", "test_results_2024.csv", "test_data/a", "test_data/log.txt", "coop/log.txt",
    "checkpoints/weights.bin", "checkpoints/best/step-0000000001.pt", "few_shot/notes.json", "views/home.html",
    "prompt_learner/model.pth.tar-best", "test_new/predictions.csv",
)  # fmt: skip


def write(folder, names, text="precious"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_overwriting_discards_what_the_run_wrote_and_nothing_else(tmp_path):
    with open_run(config(tmp_path)):
        write(tmp_path, (*OURS, *FOREIGN))
    with open_run(config(tmp_path, seed=2), overwrite=True) as directory:
        assert directory.results() is None
    assert files_in(tmp_path) == {".lock", "config.yaml", *FOREIGN}
    assert not (tmp_path / "tensorboard").exists()  # an emptied folder goes as well


@pytest.mark.parametrize("content", ["name: my web app", "optim: {lr: 0.1}", "[", "- a list", "", "\0"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_no_run_began_is_left_as_it_is(tmp_path, content, overwrite):
    """Even one that has files by all the names of ours."""
    write(tmp_path, (*OURS, *FOREIGN))
    write(tmp_path, ["config.yaml"], content)
    with (
        pytest.raises(UserError, match=r"config.yaml that no run of this version of cocoop_fast wrote"),
        open_run(config(tmp_path), overwrite=overwrite),
    ):
        pass
    assert files_in(tmp_path) == {"config.yaml", *OURS, *FOREIGN}
    assert (tmp_path / "config.yaml").read_text() == content


def _hold(path, ready, done):
    with open_run(config(path)):
        ready.set()
        done.wait(30)


def test_two_runs_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=r"Another process is running in"), open_run(config(tmp_path)):
        pass
    other.kill()  # a killed process leaves no lock behind
    other.join()
    with open_run(config(tmp_path)):
        pass


@pytest.mark.skipif(os.name == "nt", reason="a locked file cannot be removed there")
@pytest.mark.parametrize("removed", [False, True])
def test_two_runs_in_two_threads(tmp_path, removed):
    """Also after a cleaner of hidden files has been there."""
    said = []

    def other():
        try:
            with open_run(config(tmp_path)):
                said.append("ran")
        except UserError as error:
            said.append(str(error))

    with open_run(config(tmp_path)):
        if removed:
            (tmp_path / ".lock").unlink()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "Another process is running in" in said.pop()
    other()
    assert said == ["ran"]


@pytest.mark.skipif(os.name == "nt", reason="a locked file cannot be removed there")
def test_two_processes_after_the_lock_file_was_removed(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(30)
    (tmp_path / ".lock").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"Another process is running in"), open_run(config(tmp_path)):
            pass
    done.set()
    other.join()
    with open_run(config(tmp_path)):
        pass


def test_unusable_places(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(UserError, match=rf"output directory {path} cannot be used"),
            open_run(config(path)),
        ):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(UserError, match=r"cannot be used: Permission denied"),
        open_run(config(tmp_path / "run")),
    ):
        pass


def test_reading_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is not a run directory \(it has no config.yaml\)"):
        read_run(tmp_path)
    with open_run(config(tmp_path)):
        pass
    with pytest.raises(UserError, match=r"has no checkpoint yet"):
        read_run(tmp_path)


def _hold_with_a_child(path, ready, child):
    with open_run(config(path)):
        child.value = os.fork() or os.getpid()
        if child.value != os.getpid():
            ready.set()
        time.sleep(60)


def test_children_that_outlive_a_killed_run_do_not_keep_its_directory(tmp_path):
    """Processes that read images look every few seconds whether their parent is still there."""
    context = multiprocessing.get_context("fork")
    ready, child = context.Event(), context.Value("i", 0)
    other = context.Process(target=_hold_with_a_child, args=(tmp_path, ready, child))
    other.start()
    try:
        assert ready.wait(30)
        other.kill()
        other.join()
        with open_run(config(tmp_path)):
            pass
    finally:
        os.kill(child.value, signal.SIGKILL)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "name",
    [".lock", "log.txt", "metrics.jsonl", "results.json", "config.yaml", "checkpoints", "views", "few_shot"],
)
def test_links_that_somebody_prepared(tmp_path, name, begun, overwrite):
    victim = tmp_path / "victim"
    write(victim, ["step-0000000001.pt"])
    path = tmp_path / "run"
    path.mkdir()
    if begun:
        with open_run(config(path)):
            pass
        (path / name).unlink(missing_ok=True)
    is_folder = "." not in name
    (path / name).symlink_to(victim if is_folder else victim / "step-0000000001.pt")
    with (
        pytest.raises(
            UserError, match=rf"run/{name} is a symbolic link, and a run writes through none"
        ) as error,
        open_run(config(path), overwrite=overwrite),
    ):
        pass
    assert error.value.exit_status == 1
    assert (victim / "step-0000000001.pt").read_text() == "precious"


def test_the_output_directory_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    with open_run(config(tmp_path / "run")):
        pass
    assert (tmp_path / "disk" / "config.yaml").is_file()


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config.yaml is not a file"), open_run(config(tmp_path)):
        pass
