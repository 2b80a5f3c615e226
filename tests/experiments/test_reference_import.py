"""A run begun with the reference goes on with ours, and ours with the reference: nothing lost, nothing run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import StopAfter, tiny_config, use_tiny_clip

from cocoop_fast import UserError, cli
from cocoop_fast.experiments import experiment
from cocoop_fast.experiments.reference_import import export_checkpoint, import_checkpoint
from cocoop_fast.runs import checkpoint, reference_checkpoint
from cocoop_fast.runs.directory import read_run
from cocoop_fast.training.observer import Observer


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


class Steps(Observer):
    def __init__(self):
        self.steps = []

    def on_step(self, info):
        self.steps.append((info.epoch, info.batch, info.lr, info.loss))


def interrupted(folder, epochs_done, **fields):
    config = tiny_config(folder, **fields)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, observer=StopAfter(10 * epochs_done + 1))
    return config


def test_there_and_back_again(tmp_path):
    """Exported after an epoch and imported again, a run ends bit for bit where the uninterrupted one does."""
    whole = Steps()
    config = tiny_config(tmp_path / "whole", optim__epochs=3)
    experiment.run(config, observer=whole)
    interrupted(tmp_path / "half", 1, optim__epochs=3)
    path = export_checkpoint(tmp_path / "half", tmp_path / "theirs")
    assert path == tmp_path / "theirs/prompt_learner/model.pth.tar-1"
    again = replace(config, output_dir=tmp_path / "again")
    folder, epochs = import_checkpoint(again, tmp_path / "theirs")
    assert folder == tmp_path / "again" and epochs == 1
    rest = Steps()
    experiment.run(again, observer=rest)
    assert rest.steps == whole.steps[10:]
    one, other = (read_run(tmp_path / name)[1].parameters for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_of_the_reference_in_float16_with_its_scheduler(tmp_path):
    """What it holds is what the run begins with; the learning rate is that of the epoch, not the file's."""
    interrupted(tmp_path / "half", 2, optim__epochs=4)
    content = torch.load(export_checkpoint(tmp_path / "half"), weights_only=True)
    content["state_dict"] = {name: value.half() for name, value in content["state_dict"].items()}
    for state in content["optimizer"]["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].half()
    content["optimizer"]["param_groups"][0]["lr"] = 0.1
    content["scheduler"]["successor"] = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.zeros(1)], lr=0.1), 4
    )
    torch.save(content, tmp_path / "model.pth.tar-2")
    config = tiny_config(tmp_path / "on", optim__epochs=4)
    import_checkpoint(config, tmp_path / "model.pth.tar-2")
    began = read_run(tmp_path / "on")[1]
    assert (began.epoch, began.batch, began.step) == (3, 0, 20)
    for i, (name, value) in enumerate(began.parameters.items()):
        assert value.dtype == torch.float32 and torch.equal(value, content["state_dict"][name].float())
        momentum = began.optimizer["state"][i]["momentum_buffer"]
        assert torch.equal(momentum, content["optimizer"]["state"][i]["momentum_buffer"].float())
    steps = Steps()
    experiment.run(config, observer=steps)
    assert sorted({rate for _, _, rate, _ in steps.steps}) == pytest.approx(
        [0.001 * (1 + math.cos(math.pi * e / 4)) for e in (2, 1)], abs=1e-12, rel=0
    )


@pytest.mark.parametrize("epochs_done", [0, 1, 2, 5, 9])
def test_the_learning_rate_of_every_epoch_is_the_references_also_after_a_resume(tmp_path, epochs_done):
    """REFERENCE: 1e-5 in epoch 1, then 0.001 (1 + cos(pi (e - 2) / 10)): .002, .00195106, ..., .00019098."""
    table = [1e-5] + [0.001 * (1 + math.cos(math.pi * (epoch - 2) / 10)) for epoch in range(2, 11)]
    assert round(table[2], 8) == 0.00195106 and round(table[9], 8) == 0.00019098
    config = tiny_config(tmp_path, data__shots=1, optim__epochs=10, optim__batch_size=5)
    steps = Steps()
    if epochs_done:
        with pytest.raises(KeyboardInterrupt):
            experiment.run(config, observer=StopAfter(epochs_done + 1))
    experiment.run(config, observer=steps)
    assert [epoch for epoch, *_ in steps.steps] == list(range(epochs_done + 1, 11))
    assert [rate for _, _, rate, _ in steps.steps] == pytest.approx(table[epochs_done:], abs=1e-12, rel=0)


def test_what_cannot_be_continued_is_refused_and_nothing_written(tmp_path):
    interrupted(tmp_path / "half", 1)
    path = export_checkpoint(tmp_path / "half")
    whole = torch.load(path, weights_only=True)

    def refused(sentence, file=path, **fields):
        with pytest.raises(UserError, match=sentence):
            import_checkpoint(tiny_config(tmp_path / "new", **fields), file)
        assert not (tmp_path / "new").exists()

    refused("lacks meta_net", file=saved(tmp_path, whole, state_dict={"ctx": whole["state_dict"]["ctx"]}))
    refused("no momentum of SGD", file=saved(tmp_path, whole, optimizer=None))
    refused("no momentum of SGD", file=saved(tmp_path, whole, optimizer={"state": {0: {}}}))
    refused("does not say how many epochs", file=saved(tmp_path, whole, epoch=None))
    refused("was trained 9 epochs, but the configuration says 2", file=saved(tmp_path, whole, epoch=9))
    ctx = torch.full_like(whole["state_dict"]["ctx"], float("nan"))
    refused(
        "`ctx` with values that are not finite",
        saved(tmp_path, whole, state_dict={**whole["state_dict"], "ctx": ctx}),
    )
    momentum = {
        i: {"momentum_buffer": one["momentum_buffer"] / 0} for i, one in whole["optimizer"]["state"].items()
    }
    refused(
        "momentum that is not finite",
        saved(tmp_path, whole, optimizer={**whole["optimizer"], "state": momentum}),
    )
    refused("shape", prompt={"ctx_init": "", "n_ctx": 7})
    refused("also has meta_net", prompt__method="coop")
    refused("does not exist", file=tmp_path / "none")
    with pytest.raises(UserError, match="holds a run already"):
        import_checkpoint(tiny_config(tmp_path / "half"), path)
    import_checkpoint(tiny_config(tmp_path / "half"), path, overwrite=True)


def saved(folder, content, **changes):
    path = folder / "changed.pth.tar"
    torch.save({**content, **changes}, path)
    return path


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        experiment.run(tiny_config(tmp_path / "half", checkpoint_steps=1), observer=StopAfter(4))
    with pytest.raises(UserError, match="batches into epoch 1"):
        export_checkpoint(tmp_path / "half")
    experiment.run(tiny_config(tmp_path / "zero", prompt__method="zeroshot"))
    with pytest.raises(UserError, match=r"zeroshot run in .* learns no context"):
        export_checkpoint(tmp_path / "zero")
    with pytest.raises(UserError, match="not a run directory"):
        export_checkpoint(tmp_path)


def test_the_commands(tmp_path, capsys):
    interrupted(tmp_path / "half", 1)
    assert (
        cli.run(["checkpoint", "export", str(tmp_path / "half"), "-o", str(tmp_path / "theirs"), "--json"])
        == 0
    )
    path = json.loads(capsys.readouterr().out)["path"]
    assert reference_checkpoint.load(tmp_path / "theirs").epoch == 1
    folder = tmp_path / "to go on"
    arguments = ["-o", str(folder), "data.shots", "2", "optim.epochs", "2"]
    assert cli.run(["checkpoint", "import", path, *arguments]) == 0
    told = capsys.readouterr().out
    assert told == f"Epoch 1 is done in {folder}. To go on: cocoop-fast train -c '{folder}/config.yaml'\n"
    assert cli.run(["train", "-c", str(folder / "config.yaml"), "--quiet"]) == 0
    assert read_run(folder)[1].step == 20
    capsys.readouterr()
    assert cli.run(["checkpoint", "import", path, *arguments]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert checkpoint.load_newest(folder / "checkpoints").step == 20
