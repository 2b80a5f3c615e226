"""Checkpoint files: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from cocoop_fast import UserError
from cocoop_fast.runs import checkpoint
from cocoop_fast.runs.checkpoint import Checkpoint
from cocoop_fast.training import rng


def sample(step: int = 7) -> Checkpoint:
    parameter = nn.Parameter(torch.randn(3, 5))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return Checkpoint(
        config={"seed": 1, "optim": {"lr": 0.1}},
        classnames=["cat", "dog"],
        data_fingerprint="abc",
        parameters={"ctx": parameter.detach().clone()},
        optimizer=optimizer.state_dict(),
        scaler={},
        rng=rng.capture(),
        epoch=2,
        batch=3,
        step=step,
        seconds=1.5,
    )


def test_one_that_does_not_name_the_other_classes_is_read(tmp_path):
    path = checkpoint.save(tmp_path, sample())
    content = torch.load(path, weights_only=True)
    del content["other_classes"]
    torch.save(content, path)
    assert checkpoint.load(path).other_classes == []


def test_round_trip(tmp_path):
    saved = sample()
    path = checkpoint.save(tmp_path / "folder", saved)
    assert path.name == "step-0000000007.pt"
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.parameters["ctx"], saved.parameters["ctx"])
    momentum = loaded.optimizer["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, saved.optimizer["state"][0]["momentum_buffer"])
    assert (loaded.config, loaded.classnames, loaded.epoch, loaded.batch, loaded.step, loaded.seconds) == (
        saved.config, ["cat", "dog"], 2, 3, 7, 1.5,
    )  # fmt: skip
    assert torch.load(path, weights_only=True)["data_fingerprint"] == "abc"  # an ordinary, safe torch file
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_random_states_come_back():
    rng.seed_everything(3)
    state = rng.capture()
    first = random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist()
    rng.restore(state)
    assert (random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist()) == first


def test_the_two_newest_are_kept(tmp_path):
    assert checkpoint.load_newest(tmp_path / "nothing") is None
    for step in (1, 2, 10, 9000):
        checkpoint.save(tmp_path, sample(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000000010.pt", "step-0000009000.pt"]
    assert checkpoint.load_newest(tmp_path).step == 9000


def test_what_is_damaged_displaces_nothing_that_is_whole(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, sample(step))
    torn = (tmp_path / "step-0000000002.pt").read_bytes()[:-100]
    (tmp_path / "step-0000000002.pt").write_bytes(torn)
    checkpoint.save(tmp_path, sample(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-0000000001.pt", "step-0000000002.pt.set-aside", "step-0000000003.pt",
    ]  # fmt: skip
    (tmp_path / "step-0000000003.pt").write_bytes(b"")
    assert checkpoint.load_newest(tmp_path).step == 1
    checkpoint.save(tmp_path, sample(3))  # the run went on from there: the damaged file is not overwritten
    assert (tmp_path / "step-0000000002.pt.set-aside").read_bytes() == torn
    assert (tmp_path / "step-0000000003.pt.set-aside").read_bytes() == b""
    assert [checkpoint.load(path).step for path in sorted(tmp_path.glob("*.pt"))] == [1, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["parameters", "optimizer"])
def test_what_is_not_finite_is_neither_saved_nor_read(tmp_path, value, part):
    diverged = sample(2)
    tensor = {
        "parameters": diverged.parameters["ctx"],
        "optimizer": diverged.optimizer["state"][0]["momentum_buffer"],
    }
    tensor[part][1, 2] = value
    checkpoint.save(tmp_path, sample(1))
    with pytest.raises(UserError, match=r"After step 2, .* is not finite, so it is not saved") as error:
        checkpoint.save(tmp_path, diverged)
    assert error.value.exit_status == 1
    path = tmp_path / "step-0000000002.pt"
    torch.save({"format": "cocoop_fast checkpoint", "version": 1, **vars(diverged)}, path)
    with pytest.raises(
        UserError, match=r"has values that are not finite in .*delete it to go on from an older"
    ):
        checkpoint.load(path)
    heard = []
    assert checkpoint.load_newest(tmp_path, heard.append).step == 1 and "not finite" in heard[0]


@pytest.mark.parametrize(
    "parameters", [None, [], {"ctx": [1.0]}, {1: torch.ones(2)}, {"ctx": torch.eye(2).to_sparse()}]
)
def test_parameters_of_other_kinds(tmp_path, parameters):
    path = tmp_path / "step-0000000001.pt"
    content = {"format": "cocoop_fast checkpoint", "version": 1, **vars(sample())}
    torch.save({**content, "parameters": parameters}, path)
    with pytest.raises(UserError, match=r"holds something else than parameters|damaged or not a checkpoint"):
        checkpoint.load(path)


def test_a_damaged_newest_file_is_passed_over(tmp_path):
    checkpoint.save(tmp_path, sample(1))
    newest = checkpoint.save(tmp_path, sample(2))
    newest.write_bytes(newest.read_bytes()[:-100])
    heard = []
    assert checkpoint.load_newest(tmp_path, heard.append).step == 1
    assert (
        len(heard) == 1
        and "step-0000000002.pt is damaged" in heard[0]
        and "Using step-0000000001.pt" in heard[0]
    )
    (tmp_path / "step-0000000001.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-0000000002.pt is damaged"):
        checkpoint.load_newest(tmp_path)


def test_no_flipped_byte_is_read_as_something_else(tmp_path):
    original = sample()
    path = checkpoint.save(tmp_path, original)
    whole = path.read_bytes()
    refused = 0
    positions = random.Random(0).sample(range(len(whole)), 400)
    for position in positions:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        # Only padding and unused zip fields may change unnoticed: they change nothing.
        assert torch.equal(loaded.parameters["ctx"], original.parameters["ctx"])
        assert torch.equal(loaded.rng["torch"], original.rng["torch"])
        assert (loaded.config, loaded.optimizer["param_groups"]) == (
            original.config, original.optimizer["param_groups"],
        )  # fmt: skip
    assert refused > len(positions) / 2


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_truncated_files(tmp_path, length):
    path = checkpoint.save(tmp_path, sample())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"damaged or not a checkpoint; delete it to go on from an older"):
        checkpoint.load(path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path):
    path, proof = tmp_path / "step-0000000001.pt", tmp_path / "proof"
    torch.save(
        {"format": "cocoop_fast checkpoint", "version": 1, **vars(sample()), "config": Malicious(proof)}, path
    )
    with pytest.raises(UserError, match=r"holds something else than a run's state in `config`"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(UserError, match=r"not a checkpoint"):
        checkpoint.load(path)
    assert not proof.exists()


def test_foreign_files(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=r"is not a checkpoint of cocoop_fast"):
        checkpoint.load(path)
    torch.save({"format": "cocoop_fast checkpoint", "version": 99}, path)
    with pytest.raises(UserError, match=r"format 99, and this version of cocoop_fast reads format 1"):
        checkpoint.load(path)
    torch.save({"format": "cocoop_fast checkpoint", "version": 1}, path)
    with pytest.raises(UserError, match=r"incomplete"):
        checkpoint.load(path)
    with pytest.raises(UserError, match=r"does not exist"):
        checkpoint.load(tmp_path / "none.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, sample(1))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"step-0000000002.pt cannot be written .*No space left"):
        checkpoint.save(tmp_path, sample(2))
    assert checkpoint.load_newest(tmp_path).step == 1


def test_parameters_must_fit():
    model = nn.Module()
    model.prompt_learner = nn.Linear(4, 2)
    good = checkpoint.learned_parameters(model)
    checkpoint.load_parameters(model, {name: value.half() + 1 for name, value in good.items()}, "file")
    assert model.prompt_learner.weight.dtype == torch.float32
    with pytest.raises(UserError, match=r"file lacks bias: it was trained with another method"):
        checkpoint.load_parameters(model, {"weight": good["weight"]}, "file")
    with pytest.raises(UserError, match=r"file also has ctx"):
        checkpoint.load_parameters(model, {**good, "ctx": good["bias"]}, "file")
    with pytest.raises(UserError, match=r"`weight` of shape \(3, 4\) where the model needs \(2, 4\)"):
        checkpoint.load_parameters(model, {**good, "weight": torch.zeros(3, 4)}, "file")
    with pytest.raises(UserError, match=r"file has `bias` with values that are not finite in float32"):
        checkpoint.load_parameters(model, {**good, "bias": torch.tensor([0.0, float("nan")])}, "file")
    with pytest.raises(UserError, match=r"not finite in float16"):
        checkpoint.load_parameters(model.half(), {**good, "bias": torch.tensor([0.0, 1e6])}, "file")
    assert all(value.isfinite().all() for value in model.parameters())
