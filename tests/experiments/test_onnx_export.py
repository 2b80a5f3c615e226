"""A run as an ONNX file: the same logits in onnxruntime, for any number of images, and all that its user needs inside."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_clip
from tiny_runs import loaded_tiny_clip, tiny_config, use_tiny_clip

from cocoop_fast import cli
from cocoop_fast.config import PromptConfig
from cocoop_fast.errors import UserError
from cocoop_fast.experiments import experiment, onnx_export
from cocoop_fast.experiments.onnx_export import _by_onnxruntime, _Classifier, export_onnx
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.methods import build_model

NAMES = ("digit zero", "digit one", "letter a")


@pytest.fixture
def packages():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="of the extra onnx")


@pytest.mark.soak  # a quarter of a minute
def test_cocoop_with_the_demo_clip_is_the_same_in_onnxruntime(tmp_path, packages, capsys):
    import onnx

    config = tiny_config(tmp_path / "run", optim__epochs=1, data__shots=1)
    experiment.run(config)
    file = tmp_path / "digits.onnx"
    call = ["export", str(tmp_path / "run"), "--onnx", str(file), "--classes", ",".join(NAMES), "--json"]
    assert cli.run(call) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["text"] == "tree" and said["nbytes"] == file.stat().st_size
    predictor = Predictor.from_run(tmp_path / "run", classnames=NAMES, device="cpu")
    scale = float(predictor.model.logit_scale.exp())
    assert 0 < said["difference"] <= onnx_export.COSINE_BOUND * scale
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = predictor.model(images)
        found = _by_onnxruntime(file.read_bytes(), images)
        bound = onnx_export.COSINE_BOUND * scale
        assert (
            found.shape == (batch, 3) and expected.std() > 10 * bound
        )  # so that other logits are told apart
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    about = {one.key: json.loads(one.value) for one in onnx.load(file).metadata_props}
    clip = predictor.clip
    assert about["classnames"] == list(NAMES) and about["image_size"] == 32 and about["method"] == "cocoop"
    assert about["mean"] == list(clip.mean) and about["std"] == list(clip.std)


@pytest.mark.parametrize(
    ("fields", "fixed"),
    [
        ({"method": "zeroshot", "template": "a photo of a {}."}, True),
        ({"method": "coop", "ctx_init": "a photo of a"}, True),
        ({"method": "coop", "ctx_init": "", "n_ctx": 3, "csc": True, "class_position": "middle"}, True),
        ({"method": "cocoop", "ctx_init": "a photo of a"}, False),
        ({"method": "cocoop", "ctx_init": "", "n_ctx": 4, "class_position": "middle"}, False),
        ({"method": "linear-probe"}, False),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@torch.no_grad()
def test_what_is_traced_computes_what_the_model_does(fields, fixed):
    """Without the exporter, which takes seconds a model."""
    model = build_model(PromptConfig(**fields), list(NAMES), loaded_tiny_clip())
    for one in model.prompt_learner.parameters():
        one.add_(torch.randn(one.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    model.prompt_learner.eval()
    classifier = _Classifier(model).eval()
    assert (classifier.fixed is not None) == fixed
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classifier(images), model(images), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_number_of_images_stays_free_in_the_traced_graph():
    """The exporter begins with this graph; a length read as a Python number would fix it."""
    clip = replace(loaded_tiny_clip(), model=tiny_clip(layers=1))
    classifier = _Classifier(
        build_model(PromptConfig(method="cocoop", ctx_init="a"), list(NAMES), clip)
    ).eval()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = classifier(images)
    free = {"image": {0: torch.export.Dim("batch")}}
    traced = torch.export.export(classifier, (images[:2],), dynamic_shapes=free).module()
    torch.testing.assert_close(traced(images), expected, rtol=1e-5, atol=1e-4)


def test_what_does_not_compute_the_same_is_not_written(tmp_path, monkeypatch):
    use_tiny_clip(monkeypatch)
    experiment.run(tiny_config(tmp_path / "run", prompt__method="zeroshot"))
    monkeypatch.setattr(onnx_export, "_check_installed", lambda: None)
    monkeypatch.setattr(onnx_export, "_to_onnx", lambda *_: b"model")
    monkeypatch.setattr(onnx_export, "_by_onnxruntime", lambda _, images: torch.zeros(len(images), 5))
    with pytest.raises(UserError, match="differ from torch's by up to"):
        export_onnx(tmp_path / "run", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (["export", "run"], "Name the file to write: --onnx FILE."),
        (["export", "run", "--onnx", "no/m.onnx"], "The folder no of --onnx is not there"),
        (
            ["export", "run", "--onnx", "m.onnx"],
            "onnxscript, which is not installed: pip install 'cocoop-fast[onnx]'",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, monkeypatch, capsys, call, sentence):
    monkeypatch.chdir(tmp_path)
    if "onnxscript" in sentence:
        pytest.importorskip("onnxruntime", reason="of the extra onnx")
        monkeypatch.setitem(sys.modules, "onnxscript", None)
    elif "folder" in sentence:
        monkeypatch.setattr(onnx_export, "_check_installed", lambda: None)
    assert cli.run(call) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
