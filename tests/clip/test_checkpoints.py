"""Weights files as trainers write them, and files that are none: what is read, what is refused and how."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch
from clip_sources import (
    NAME,
    add_architectures,
    assert_same_features,
    ignore_assumptions,
    load,
)
from safetensors.torch import save_file
from tiny_models import tiny_clip

from cocoop_fast import UserError
from cocoop_fast.clip.checkpoints import read_state


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    add_architectures(tmp_path_factory.mktemp("configs"))


class Whole(torch.nn.Module):
    """A trainer's own module around the model."""

    def __init__(self, model):
        super().__init__()
        self.clip = model


def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


CHECKPOINTS = {
    "numpy": lambda s: {"state_dict": s, "best": np.float64(1), "curve": np.arange(3)},
    "namespace": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=1)},
    "model": lambda s: {"model": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "lightning": lambda s: {
        "state_dict": {**prefixed("model.", s), "loss.weight": torch.ones(1)},
        "hyper_parameters": argparse.Namespace(),
    },
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled tower": lambda s: {k.replace("visual.", "visual._orig_mod."): v for k, v in s.items()},
    "distributed and compiled": lambda s: {"state_dict": prefixed("module._orig_mod.", s)},
    "lightning, distributed": lambda s: {"state_dict": prefixed("model.module.", s)},
    "deepspeed": lambda s: {"module": prefixed("clip_model.", s)},
    "average": lambda s: {"ema": {k: v + 1 for k, v in s.items()}, "state_dict": s},
    "optimizer": lambda s: {"model": s, "optimizer": {"token_embedding.weight": torch.ones(2)}},
    "siglip": lambda s: {**s, "logit_bias": torch.tensor(-10.0)},
    "text": lambda s: {k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in s.items()},
    "half": lambda s: {k: v.half() for k, v in s.items()},
}


@ignore_assumptions
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_trainers(tmp_path, kind):
    model = tiny_clip(quick_gelu=False)
    torch.save(CHECKPOINTS[kind](model.state_dict()), tmp_path / "checkpoint.ckpt")
    assert_same_features(
        load(NAME, tmp_path / "checkpoint.ckpt").model, model.half().float() if kind == "half" else model
    )


@ignore_assumptions
def test_a_whole_model_is_read_without_its_class(tmp_path):
    model = tiny_clip(quick_gelu=False)
    torch.save(Whole(model), tmp_path / "whole.pt")
    assert_same_features(load(NAME, tmp_path / "whole.pt").model, model)


def test_names_of_mobile_clip_are_left_to_open_clip(tmp_path):
    state = {"text_encoder.embedding_layer.weight": torch.ones(2, 2), "image_encoder.x": torch.ones(1)}
    torch.save({"state_dict": prefixed("module.", state)}, tmp_path / "mobileclip.pt")
    assert read_state(tmp_path / "mobileclip.pt").keys() == state.keys()


def edited(state, **values):
    return {**state, **values}


BAD = {
    "two.pt": (
        lambda s: {**prefixed("student.", s), **prefixed("teacher.", s)},
        "several CLIPs .prefixes 'stu",
    ),
    "none.pt": (lambda s: {"weight": torch.ones(2)}, "holds no CLIP"),
    "missing.pt": (
        lambda s: {k: v for k, v in s.items() if k != "ln_final.bias"},
        r"missing \(`ln_final.bias`\)",
    ),
    "more.pt": (lambda s: edited(s, extra=torch.ones(1)), r"not this architecture's \(`extra`\)"),
    "shape.pt": (
        lambda s: {**s, "ln_final.bias": torch.ones(5)},
        r"`ln_final.bias` is \[5\] instead of \[48\]",
    ),
    "nan.pt": (
        lambda s: {**s, "ln_final.bias": torch.full((48,), math.nan)},
        r"NaN or infinite \(`ln_final.bias`",
    ),
    "inf.pt": (
        lambda s: {**s, "visual.proj": torch.full((32, 64), math.inf)},
        r"NaN or infinite \(`visual.proj`",
    ),
    "logit_scale.pt": (
        lambda s: edited(s, logit_scale=torch.tensor(math.nan)),
        r"NaN or infinite \(`logit_scale`",
    ),
    "zeros.pt": (
        lambda s: {**s, "visual.proj": torch.zeros(32, 64)},
        r"1 of the weights are zero throughout, as in a file that was not downloaded to its end \(`visual.proj`",
    ),
    "whole.pt": (
        lambda s: {**s, "visual.proj": torch.ones(32, 64, dtype=torch.int8)},
        r"1 of the weights are whole numbers, as in a quantized model \(`visual.proj`",
    ),
    "sparse.pt": (
        lambda s: {**s, "token_embedding.weight": s["token_embedding.weight"].to_sparse()},
        "is no dense tensor with numbers",
    ),
    "numpy.pt": (
        lambda s: {key: value.numpy() for key, value in s.items()},
        "is no dense tensor with numbers",
    ),
    "meta.pt": (
        lambda s: {key: value.to("meta") for key, value in s.items()},
        "is no dense tensor with numbers",
    ),
    "complex.pt": (
        lambda s: {**s, "visual.proj": s["visual.proj"].to(torch.complex64)},
        r"numbers of a kind that is not read: ComplexFloatStorage\.",
    ),
}


@ignore_assumptions
@pytest.mark.parametrize("file", BAD)
def test_weights_are_looked_at(tmp_path, file):
    content, message = BAD[file]
    torch.save(content(tiny_clip(quick_gelu=False).state_dict()), tmp_path / file)
    with pytest.raises(UserError, match=f"{file}' of model '{NAME}' could not be loaded: .*{message}"):
        load(NAME, tmp_path / file)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
        (b"<!doctype html><html></html>", "web page"),
        (b"\xef\xbb\xbf\r\n <!DOCTYPE html>", "web page"),
        (b'{"error": "Repository not found"}', "a server's answer"),
        (bytes(5000), "begins with zeros: it is not complete"),
        (b"", "is empty"),
        (b"no weights at all", "damaged"),
    ],
)
def test_files_that_are_no_weights(tmp_path, suffix, content, message):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(NAME, path)
    assert "weights_only" not in str(error.value)  # PyTorch's advice
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("kept", [9, 100, -2000])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".safetensors.part", ".pt.crdownload"])
def test_unfinished_downloads(tmp_path, suffix, kept):
    path = tmp_path / f"w{suffix}"
    state = tiny_clip().state_dict()
    save_file(state, path) if "safetensors" in suffix else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="not complete"):
        load(NAME, path)


@ignore_assumptions
def test_a_download_that_reserved_its_place_and_was_not_finished(tmp_path):
    """Of full length, and zeros from some byte on, as aria2 and torrents leave it."""
    path = tmp_path / "w.safetensors"
    save_file(tiny_clip().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 8].ljust(len(content), b"\0"))
    with pytest.raises(UserError, match="zero throughout, as in a file that was not downloaded to its end"):
        load(NAME, path)


@pytest.mark.filterwarnings("ignore:Nothing says which activation")
@pytest.mark.parametrize("name", ["safetensors.pt", "torch.safetensors"])
def test_a_file_is_known_by_its_content(tmp_path, name):
    model = tiny_clip(quick_gelu=False)
    write = save_file if name.startswith("safetensors") else torch.save
    write(model.state_dict(), tmp_path / name)
    assert torch.equal(load(NAME, tmp_path / name).model.visual.proj, model.visual.proj)


@pytest.mark.filterwarnings("ignore:Nothing says which activation")
@pytest.mark.parametrize(
    "prefix",
    [
        "module._orig_mod.",
        "_orig_mod.module.",
        "_forward_module.",
        "clip_model.",
        "base_model.model.",
        "model.clip.",
    ],
)
def test_prefixes_of_other_trainers(tmp_path, prefix):
    model = tiny_clip(quick_gelu=False)
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.ckpt")
    assert torch.equal(load(NAME, tmp_path / "w.ckpt").model.visual.proj, model.visual.proj)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match="has to hold one file of weights"):
        load(NAME, tmp_path)
