"""CoOp's own train.py, unchanged, with the fast engine: against a miniature of its repository and of Dassl."""

from __future__ import annotations

import importlib
import io
import math
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from dassl_stand_in import REPOSITORY, TESTS, forget, patch, run, steps

from cocoop_fast import UserError
from cocoop_fast.integrations import dassl_repairs, recognise
from cocoop_fast.runs import reference_checkpoint

# The reference's learning rate in epoch e: 1e-5 first, then a cosine that begins at its top and never ends.
RATES = [1e-5] + [0.001 * (1 + math.cos(math.pi * (epoch - 2) / 10)) for epoch in range(2, 11)]


@pytest.fixture(autouse=True)
def fresh_repository(monkeypatch):
    """Each test imports Dassl, the trainers and the integration anew. The stand-in's forms count as the reference's."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    forget()
    import trainers.cocoop
    import trainers.coop

    stand_in = {"CoCoOp": trainers.cocoop.CoCoOp, "CoOp": trainers.coop.CoOp}
    forms = {
        name: {part: frozenset([form]) for part, form in recognise.parts(kind).items()}
        for name, kind in stand_in.items()
    }
    monkeypatch.setattr(recognise, "KNOWN", forms)
    forget()
    yield
    forget()


def accuracy(log):
    return float(re.findall(r"^\* accuracy: ([\d.]+)%$", log, re.M)[-1])


def parse_test_res(path, end_signal):
    """The last accuracy after the end signal, as the result parsers of CoOp and its descendants find it."""
    found, ended = None, False
    for line in path.read_text().splitlines():
        ended = ended or line.strip() == end_signal
        match = re.search(r"\* accuracy: ([\.\deE+-]+)%", line)
        if match and ended:
            found = float(match.group(1))
    return found


def test_the_stand_in_has_the_defects(tmp_path):
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4"):
        run(tmp_path)
    forget()
    dassl_repairs.repair_constructor()
    run(tmp_path, "OPTIM.MAX_EPOCH", "2")
    with pytest.raises(pickle.UnpicklingError):
        run(tmp_path, "OPTIM.MAX_EPOCH", "3")


@pytest.mark.parametrize("trainer", ["CoCoOp", "CoOp"])
@pytest.mark.parametrize("registered_first", [False, True])
def test_steps_are_the_references(tmp_path, trainer, registered_first):
    dassl_repairs.repair_dassl()
    dense = run(tmp_path / "dense", "OPTIM.MAX_EPOCH", "2", trainer=trainer)
    if not registered_first:
        forget()
    patch()
    fast = run(tmp_path / "fast", "OPTIM.MAX_EPOCH", "2", trainer=trainer)
    assert "(cocoop_fast)" in fast and "(cocoop_fast)" not in dense
    assert len(steps(fast)) == len(steps(dense)) == 18
    if trainer == "CoOp":  # nothing random in it
        for (rate, loss), (expected_rate, expected) in zip(steps(fast), steps(dense), strict=True):
            assert rate == expected_rate and loss == pytest.approx(expected, rel=2e-5)
        assert accuracy(fast) == accuracy(dense)
        assert re.search(
            r"^epoch \[1/2\] batch \[9/9\] time .* loss \S+ \(\S+\) acc \S+ \(\S+\) lr ", fast, re.M
        )
    else:
        assert re.search(
            r"^epoch \[1/2\] batch \[9/9\] time .* loss \S+ \(\S+\) lr 2.0000e-03 eta ", fast, re.M
        )


def test_cocoop_goes_on_as_the_reference_would(tmp_path):
    """From a checkpoint of the dense trainer, whose scheduler is an object: same losses, rates and accuracy."""
    dassl_repairs.repair_constructor()
    run(tmp_path / "dense", "OPTIM.MAX_EPOCH", "2", "TRAIN.CHECKPOINT_FREQ", "1")
    start = tmp_path / "dense"
    forget()
    dassl_repairs.repair_dassl()
    dense = run(tmp_path / "on", "OPTIM.MAX_EPOCH", "4", options=["--resume", str(start)])
    forget()
    patch()
    fast = run(tmp_path / "fast", "OPTIM.MAX_EPOCH", "4", options=["--resume", str(start)])
    assert len(steps(fast)) == 18
    for (rate, loss), (expected_rate, expected) in zip(steps(fast), steps(dense), strict=True):
        assert rate == expected_rate and loss == pytest.approx(expected, rel=2e-5)
    assert accuracy(fast) == accuracy(dense)

    loaded = run(
        tmp_path / "test",
        options=["--eval-only", "--model-dir", str(tmp_path / "on"), "--load-epoch", "4"],
    )
    assert accuracy(loaded) == accuracy(dense)
    assert 'Loading weights to prompt_learner from "' in loaded
    new = ["--eval-only", "--model-dir", str(tmp_path / "on"), "--load-epoch", "4"]
    assert accuracy(run(tmp_path / "new", "DATASET.SUBSAMPLE_CLASSES", "new", options=new)) >= 0


@pytest.mark.parametrize("interrupted", [1, 2, 5])
def test_the_learning_rate_of_every_epoch_also_after_a_resume(tmp_path, interrupted):
    patch()
    whole = run(tmp_path / "whole")
    assert [rate for rate, _ in steps(whole)[::9]] == pytest.approx(RATES, abs=1e-12, rel=0)

    frequency = ["TRAIN.CHECKPOINT_FREQ", "1"]
    first = run_until(tmp_path / "two", interrupted, *frequency)
    second = run(tmp_path / "two", *frequency)
    assert f"Previous epoch: {interrupted}" in second
    both = steps(first)[: 9 * interrupted] + steps(second)
    assert both == steps(whole)
    assert (tmp_path / "two/log.txt-later").exists()


def run_until(output, epochs, *pairs):
    """As if the process had been killed after some epochs."""
    from dassl import engine

    save_model = engine.TrainerX.save_model

    def save_and_die(self, epoch, *arguments, **options):
        save_model(self, epoch, *arguments, **options)
        if epoch + 1 == epochs:
            raise KeyboardInterrupt

    engine.TrainerX.save_model = save_and_die
    printed = io.StringIO()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(output, *pairs, printed=printed)
    finally:
        engine.TrainerX.save_model = save_model
    return printed.getvalue()


def test_a_rate_that_was_frozen_is_set_right(tmp_path):
    """A file written after the reference's own resume: its optimizer has the rate of the epoch of the interruption."""
    patch()
    run_until(tmp_path, 5, "TRAIN.CHECKPOINT_FREQ", "1")
    path = tmp_path / "prompt_learner/model.pth.tar-5"
    content = torch.load(path, weights_only=True)  # what is written is safe to read
    content["optimizer"]["param_groups"][0]["lr"] = RATES[2]
    torch.save(content, path)
    log = run(tmp_path)
    assert [rate for rate, _ in steps(log)[::9]] == pytest.approx(RATES[5:], abs=1e-12, rel=0)


@pytest.mark.parametrize("trainer", ["CoCoOp", "CoOp"])
def test_directory_log_and_checkpoint_are_the_references(tmp_path, trainer):
    patch()
    printed = run(tmp_path, "OPTIM.MAX_EPOCH", "2", trainer=trainer)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"log.txt", "prompt_learner/checkpoint", "prompt_learner/model.pth.tar-2"}
    assert [printed.count(line) for line in ("Finish training\n", "Finished training\n")] == [1, 1]
    (tmp_path / "log.txt").write_text(printed)  # this process still has the file open
    for end_signal in ("Finish training", "Finished training", "=> result"):
        assert parse_test_res(tmp_path / "log.txt", end_signal) == accuracy(printed)
    content = torch.load(tmp_path / "prompt_learner/model.pth.tar-2", weights_only=True)
    assert list(content) == ["state_dict", "epoch", "optimizer", "scheduler", "val_result"]
    keys = {"ctx", "token_prefix", "token_suffix"}
    meta_net = {f"meta_net.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert set(content["state_dict"]) == (keys | meta_net if trainer == "CoCoOp" else keys)
    assert content["state_dict"]["token_suffix"].shape == (3, 77 - 5, 48)
    ours = reference_checkpoint.load(tmp_path)
    assert ours.epoch == 2 and ours.momentum is not None
    assert set(ours.momentum) == set(ours.parameters) == set(content["state_dict"]) - keys | {"ctx"}


def test_precisions(tmp_path):
    patch()
    halves = run(tmp_path / "fp16", "OPTIM.MAX_EPOCH", "1", "TRAINER.COCOOP.PREC", "fp16")
    assert "PREC fp16 is computed in fp32 on a CPU" in halves
    assert all(math.isfinite(loss) for _, loss in steps(halves))
    amp = run(tmp_path / "amp", "OPTIM.MAX_EPOCH", "1", "TRAINER.COCOOP.PREC", "amp")
    single = run(tmp_path / "fp32", "OPTIM.MAX_EPOCH", "1", "TRAINER.COCOOP.PREC", "fp32")
    assert steps(amp) == steps(single) == steps(halves)  # the reference's autocast is of CUDA alone
    with pytest.raises(AssertionError):
        run(tmp_path / "bad", "TRAINER.COCOOP.PREC", "fp8")  # the replaced trainer's own check


def test_warm_start(tmp_path):
    patch()
    run(tmp_path / "first", "OPTIM.MAX_EPOCH", "1")
    path = tmp_path / "first/prompt_learner/model.pth.tar-1"
    printed = run(tmp_path / "second", "OPTIM.MAX_EPOCH", "1", "MODEL.INIT_WEIGHTS", str(path))
    assert "Successfully loaded pretrained weights" in printed
    learned = reference_checkpoint.load(path).parameters["ctx"]
    start = torch.load(tmp_path / "second/prompt_learner/model.pth.tar-1", weights_only=True)
    assert (start["state_dict"]["ctx"] - learned).abs().max() < 1e-3  # one epoch of 1e-5


def test_a_loss_that_is_not_finite_ends_the_run_before_it_does_harm(tmp_path):
    patch()
    from dassl.data import DataManager

    original = DataManager.__init__

    def broken(self, cfg):
        original(self, cfg)
        self.train_loader_x[3]["img"].fill_(math.nan)

    DataManager.__init__ = broken
    with pytest.raises((FloatingPointError, UserError)):
        run(tmp_path, "OPTIM.MAX_EPOCH", "1")
    assert not (tmp_path / "prompt_learner").exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    patch()
    run(tmp_path, "OPTIM.MAX_EPOCH", "1")
    path = tmp_path / "prompt_learner/model.pth.tar-1"
    content = torch.load(path, weights_only=True)
    content["val_result"] = Mischief(tmp_path / "proof")
    torch.save(content, path)
    options = ["--eval-only", "--model-dir", str(tmp_path), "--load-epoch", "1"]
    run(tmp_path / "test", options=options)
    run(tmp_path / "on", "OPTIM.MAX_EPOCH", "2", options=["--resume", str(tmp_path)])
    assert not (tmp_path / "proof").exists()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    run(tmp_path / "test", options=options)
    assert not (tmp_path / "proof").exists()


class Mischief:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_patching_twice_and_other_trainers():
    import trainers.cocoop
    from dassl.engine import TRAINER_REGISTRY

    patch()
    from cocoop_fast.integrations.dassl import patch_dassl

    assert patch_dassl() == ()
    fast = TRAINER_REGISTRY.get("CoCoOp")
    assert fast is TRAINER_REGISTRY.get("CoCoOp") and fast is not trainers.cocoop.CoCoOp
    assert issubclass(fast, trainers.cocoop.CoCoOp) and fast.__name__ == "CoCoOp"

    @TRAINER_REGISTRY.register()
    class Other: ...

    assert TRAINER_REGISTRY.get("Other") is Other
    with pytest.raises(KeyError):
        TRAINER_REGISTRY.get("none")


def test_a_dassl_of_another_name_is_found_beside_the_script_and_by_its_registry(tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "dassl", tmp_path / "my_dassl")
    for path in (tmp_path / "my_dassl").rglob("*.py"):
        path.write_text(path.read_text().replace("from dassl", "from my_dassl"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(one for one in sys.path if one != str(REPOSITORY))])
    dassl = importlib.import_module("cocoop_fast.integrations.dassl")
    assert "my_dassl" in sys.modules and "dassl" not in sys.modules  # beside the script
    engine = importlib.import_module("my_dassl.engine")
    assert hasattr(engine.TRAINER_REGISTRY, "_cocoop_fast")
    monkeypatch.setattr(sys, "path", sys.path[1:])
    del engine.TRAINER_REGISTRY._cocoop_fast
    dassl.patch_dassl()  # nothing is beside it now, but what is imported is found
    assert hasattr(engine.TRAINER_REGISTRY, "_cocoop_fast")
    for name in [name for name in sys.modules if name.startswith("my_dassl")]:
        del sys.modules[name]


def test_repairs_are_made_only_where_they_are_needed():
    assert len(dassl_repairs.repair_dassl()) == 3
    assert [line.split(":")[0] for line in dassl_repairs.repair_dassl()] == ["load_checkpoint"]


def test_a_trainer_without_a_loader_of_clip_is_not_touched():
    patch()
    import trainers.cocoop
    import trainers.coop
    from dassl.engine import TRAINER_REGISTRY

    del trainers.cocoop.load_clip_to_cpu, trainers.coop.load_clip_to_cpu
    assert TRAINER_REGISTRY.get("CoCoOp") is trainers.cocoop.CoCoOp


def test_an_optimizer_that_leaves_out_what_is_learned_ends_the_run(tmp_path):
    patch()
    import trainers.cocoop

    build = trainers.cocoop.build_optimizer
    # As with OPTIM.STAGED_LR: modules below the learner, but not what is its own.
    trainers.cocoop.build_optimizer = lambda model, cfg: build(model.meta_net, cfg)
    with pytest.raises(UserError, match="build_optimizer leaves out ctx of the prompt learner"):
        run(tmp_path)


def test_without_dassl(monkeypatch):
    monkeypatch.setitem(sys.modules, "dassl", None)
    with pytest.raises(UserError, match="Dassl cannot be imported"):
        patch()


def test_the_script_runner_changes_no_file(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS / "helpers"), str(TESTS.parent)])}
    command = [sys.executable, "-m", "cocoop_fast.integrations.dassl"]
    result = subprocess.run(
        [
            *command,
            *["train.py", "--trainer", "CoCoOp", "--config-file", "config.yaml", "--output-dir"],
            str(tmp_path),
            "OPTIM.MAX_EPOCH",
            "1",
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "warm-up scheduler: built without `verbose`" in result.stderr
    # In a process of its own nothing says that the stand-in's code is the reference's.
    assert (
        "trainer CoCoOp is left alone, because its model has no `text_encoder`; not the reference's: build_model, "
        in (result.stdout)
    )
    assert parse_test_res(tmp_path / "log.txt", "Finish training") is not None


def test_the_script_runner_without_a_script(capsys):
    from cocoop_fast.integrations import dassl

    with pytest.raises(SystemExit, match="2"):
        dassl.main([])
    assert capsys.readouterr().err.startswith("usage:")
