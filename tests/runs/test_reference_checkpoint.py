"""The reference's checkpoint files: read without running their code, written so that it reads them."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_clip
from tiny_runs import loaded_tiny_clip
from torch import nn

from cocoop_fast import UserError
from cocoop_fast.config import OptimConfig, PromptConfig
from cocoop_fast.methods import build_model
from cocoop_fast.runs import reference_checkpoint
from cocoop_fast.runs.checkpoint import learned_parameters, load_parameters


class WarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Like the reference's: it wraps another scheduler, which drags the optimizer into the file."""

    def __init__(self, optimizer, successor):
        self.successor = successor
        super().__init__(optimizer)

    def get_lr(self):
        return [1e-5]


@pytest.fixture(scope="module")
def model():
    return build_model(PromptConfig(), ["cat", "big dog"], loaded_tiny_clip())


def reference_content(model, **changes):
    parameters = list(model.prompt_learner.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.002, momentum=0.9)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = WarmupScheduler(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10))
    return {
        "state_dict": model.prompt_learner.state_dict(),
        "epoch": 10,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "val_result": None,
        **changes,
    }


def test_a_file_like_the_references(tmp_path, model):
    folder = tmp_path / "prompt_learner"
    folder.mkdir()
    path = folder / "model.pth.tar-10"
    torch.save(reference_content(model), path)
    (folder / "checkpoint").write_text("model.pth.tar-10\n")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # or this test would show nothing
    for given in (path, folder, tmp_path):
        loaded = reference_checkpoint.load(given)
        assert loaded.epoch == 10 and loaded.path == path
        expected = dict(model.prompt_learner.named_parameters())
        assert loaded.parameters.keys() == expected.keys()
        assert all(torch.equal(loaded.parameters[name], expected[name]) for name in expected)


def test_half_precision_and_saved_on_a_gpu(tmp_path, model):
    content = reference_content(model)
    content["state_dict"] = {name: value.half() for name, value in content["state_dict"].items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = tmp_path / "model.pth.tar-10"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("/data.pkl"):  # as if it had been saved from a GPU
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(name, data)
    loaded = reference_checkpoint.load(path)
    assert loaded.parameters["ctx"].dtype == torch.float16 and loaded.parameters["ctx"].device.type == "cpu"
    load_parameters(model, loaded.parameters, "file")


@pytest.mark.parametrize("master_weights", [True, False])
def test_what_was_learned_over_a_float16_model_is_written(tmp_path, master_weights):
    """In the dtype in which it was learned, for a reference that keeps float16."""
    clip = replace(loaded_tiny_clip(), model=tiny_clip(layers=2, dtype=torch.float16))
    model, theirs = (build_model(PromptConfig(), ["cat", "big dog"], clip) for _ in range(2))
    theirs.prompt_learner.half()
    if not master_weights:
        model.prompt_learner.half()
    with torch.no_grad():
        for parameter in model.prompt_learner.parameters():
            parameter.add_(torch.randn_like(parameter))
    path = reference_checkpoint.save(tmp_path, model, OptimConfig(epochs=10), {}, epochs=10, accuracy=50.0)
    written = torch.load(path, weights_only=True)["state_dict"]
    assert written["ctx"].dtype == (torch.float32 if master_weights else torch.float16)
    assert written["token_prefix"].dtype == torch.float16
    theirs.prompt_learner.load_state_dict(written)  # as the reference resumes
    loaded = reference_checkpoint.load(path).parameters
    for name, parameter in model.prompt_learner.named_parameters():
        assert loaded[name].equal(parameter)
        assert theirs.prompt_learner.state_dict()[name].equal(parameter.half())


class Runs:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["scheduler", "state_dict", "epoch"])
def test_code_in_a_file_is_not_run(tmp_path, model, place):
    proof = tmp_path / "proof"
    for attack in (
        Runs(os.system, f"touch {proof}"),
        Runs(eval, f"open({str(proof)!r}, 'w')"),
        Runs(os.mkdir, str(proof)),
    ):
        content = reference_content(model)
        if place == "state_dict":
            content["state_dict"]["extra"] = attack
        else:
            content[place] = attack
        path = tmp_path / "model.pth.tar-10"
        torch.save(content, path)
        loaded = reference_checkpoint.load(path)
        assert torch.equal(loaded.parameters["ctx"], model.prompt_learner.ctx)
        assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the attack does work on a loader that trusts the file


def test_a_pickle_cannot_change_the_reader(tmp_path, model):
    """BUILD sets attributes on whatever object a pickle names, functions and classes included."""
    path = tmp_path / "model.pth.tar-1"
    for name in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "os\nsystem"):
        program = f"c{name}\n(N(dX\x0c\x00\x00\x00__defaults__(K\x01tstb.".encode("latin1")
        torch.save(reference_content(model), path)
        with zipfile.ZipFile(path) as source:
            parts = {entry: source.read(entry) for entry in source.namelist()}
        with zipfile.ZipFile(path, "w") as target:
            for entry, data in parts.items():
                target.writestr(entry, program if entry.endswith("data.pkl") else data)
        with pytest.raises(UserError, match=r"model.pth.tar-1"):
            reference_checkpoint.load(path)
        torch.save(reference_content(model), path)
        reference_checkpoint.load(path)


def test_damage_is_an_error_or_harmless(tmp_path, model):
    path = tmp_path / "model.pth.tar-10"
    torch.save(reference_content(model), path)
    whole = path.read_bytes()
    expected = reference_checkpoint.load(path).parameters
    for position in random.Random(1).sample(range(len(whole)), 200):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x21]) + whole[position + 1 :])
        try:
            loaded = reference_checkpoint.load(path)
        except UserError as error:
            assert str(path) in str(error)
            continue
        assert all(torch.equal(loaded.parameters[name], value) for name, value in expected.items())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError):
        reference_checkpoint.load(path)


def test_damaged_pickles_inside_an_intact_archive(tmp_path, model):
    """The zip's checksums are right here, so the unpickler itself meets the damage."""
    path = tmp_path / "model.pth.tar-10"
    torch.save(reference_content(model), path)
    with zipfile.ZipFile(path) as source:
        parts = {entry: source.read(entry) for entry in source.namelist()}
    [pickled] = [entry for entry in parts if entry.endswith("data.pkl")]
    rng = random.Random(2)
    for _ in range(200):
        damaged = bytearray(parts[pickled])
        for position in rng.sample(range(2, len(damaged)), 2):
            damaged[position] = rng.choice([*b"]})(tR.0N\x85\x86\x87", rng.randrange(256)])
        with zipfile.ZipFile(path, "w") as target:
            for entry, data in parts.items():
                target.writestr(entry, bytes(damaged) if entry == pickled else data)
        try:
            reference_checkpoint.load(path)
        except UserError as error:
            assert str(path) in str(error)


def test_a_small_file_cannot_ask_for_a_huge_tensor(tmp_path):
    path = tmp_path / "model.pth.tar-1"
    torch.save({"state_dict": {"ctx": torch.zeros(1).expand(10**6, 10**6)}, "epoch": 1}, path)
    with pytest.raises(UserError, match=r"damaged"):
        reference_checkpoint.load(path)


def test_other_files(tmp_path):
    path = tmp_path / "model.pth.tar-1"
    torch.save({"state_dict": {"ctx": torch.zeros(2)}}, path, _use_new_zipfile_serialization=False)
    assert reference_checkpoint.load(path).parameters["ctx"].tolist() == [0, 0]  # of an older PyTorch
    path.write_text("no checkpoint")
    with pytest.raises(UserError, match=r"is not a file that PyTorch wrote, or is not complete"):
        reference_checkpoint.load(path)
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match=r"no learned context"):
        reference_checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"no learned context"):
        reference_checkpoint.load(path)
    with pytest.raises(UserError, match=r"has no file `checkpoint`"):
        reference_checkpoint.load(tmp_path)
    (tmp_path / "checkpoint").write_text("model.pth.tar-9\n")
    with pytest.raises(UserError, match=r"names model.pth.tar-9, which is not there"):
        reference_checkpoint.load(tmp_path)
    (tmp_path / "checkpoint").write_text("")
    with pytest.raises(UserError, match=r"not there"):
        reference_checkpoint.load(tmp_path)
    with pytest.raises(UserError, match=r"does not exist"):
        reference_checkpoint.load(tmp_path / "none")


def test_what_we_write_the_reference_reads(tmp_path, model):
    """The calls that the reference's trainer makes on such a file."""
    optim = OptimConfig(epochs=10, batch_size=1)
    optimizer = torch.optim.SGD(model.prompt_learner.parameters(), lr=0.002, momentum=0.9)
    path = reference_checkpoint.save(
        tmp_path, model, optim, optimizer.state_dict(), epochs=optim.epochs, accuracy=81.25
    )
    assert (tmp_path / "checkpoint").read_text() == "model.pth.tar-10\n"
    for safe in (True, False):
        content = torch.load(path, weights_only=safe)
        assert list(content) == ["state_dict", "epoch", "optimizer", "scheduler", "val_result"]
        assert content["epoch"] == 10 and content["val_result"] == 81.25
    fresh = build_model(PromptConfig(), ["cat", "big dog"], loaded_tiny_clip())
    assert fresh.prompt_learner.state_dict().keys() == content["state_dict"].keys()
    assert {"ctx", "token_prefix", "token_suffix", "meta_net.linear1.weight"} < content["state_dict"].keys()
    fresh.prompt_learner.load_state_dict(content["state_dict"])  # strictly, as its resume does
    again = torch.optim.SGD(fresh.prompt_learner.parameters(), lr=1)
    again.load_state_dict(content["optimizer"])
    scheduler = WarmupScheduler(again, torch.optim.lr_scheduler.CosineAnnealingLR(again, 10))
    scheduler.load_state_dict(content["scheduler"])
    assert scheduler.last_epoch == 1 and content["scheduler"]["successor"]["last_epoch"] == 9
    ours = reference_checkpoint.load(tmp_path)
    assert ours.epoch == 10
    assert all(torch.equal(ours.parameters[n], p) for n, p in learned_parameters(model).items())


def test_a_module_without_token_buffers_can_be_written(tmp_path):
    model = nn.Module()
    model.prompt_learner = nn.Module()
    model.prompt_learner.ctx = nn.Parameter(torch.ones(4, 8))
    reference_checkpoint.save(tmp_path, model, OptimConfig(epochs=2), {}, epochs=2)
    assert torch.equal(reference_checkpoint.load(tmp_path).parameters["ctx"], torch.ones(4, 8))
