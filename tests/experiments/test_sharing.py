"""What was learned as a folder, and by way of a hub on this machine."""

from __future__ import annotations

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_stand_in import Hub, hub_at_work
from open_clip.model import convert_weights_to_lp
from safetensors.torch import load_file
from tiny_models import tiny_clip, tiny_openai_clip
from tiny_runs import tiny_config, use_tiny_clip, write_images

import cocoop_fast
from cocoop_fast import (
    CoOp,
    CustomCLIP,
    UserError,
    ZeroShot,
    cli,
    load_pretrained,
    reference_cfg,
    save_pretrained,
)
from cocoop_fast.clip import hub as hubs
from cocoop_fast.clip.fingerprint import fingerprint
from cocoop_fast.config import ModelConfig
from cocoop_fast.experiments.experiment import run
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.methods.base import LearnedPromptCLIP
from cocoop_fast.methods.learner import Learner
from cocoop_fast.prompts.layout import CLASS_NAME, Context, layout_of_segments

NAMES = ["red fox", "polar bear", "wolf"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        run(tiny_config(path, optim__lr=0.05, optim__batch_size=4))
    return path


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Empty, and the cache of downloads with it."""
    hub = Hub()
    hubs._asked.cache_clear()
    with hub_at_work(hub) as address:
        for name, value in {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield hub


def custom(clip=None, kind=CustomCLIP, names=NAMES, **options):
    cfg = reference_cfg(
        **{"ctx_init": "a photo of a", "n_ctx": 4, "precision": "fp32", "image_size": 32, **options}
    )
    model = kind(cfg, names, clip or tiny_clip())
    with torch.no_grad():
        for value in model.prompt_learner.parameters():
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    model.prompt_learner.eval()
    return model


def test_from_a_run_and_back(run_dir, tmp_path):
    images = write_images(tmp_path / "images", 3)
    predictor = Predictor.from_run(run_dir)
    folder = predictor.save_pretrained(tmp_path / "shared")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000
    again = Predictor.from_pretrained(folder)
    assert again.predict(images) == predictor.predict(images)
    others = Predictor.from_pretrained(folder, classnames=NAMES)
    assert others.predict(images) == Predictor.from_run(run_dir, classnames=NAMES).predict(images)
    # Shared again with other classes chosen, it still says which it was trained on.
    second = others.save_pretrained(tmp_path / "again")
    assert json.loads((second / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_the_card_is_made_from_the_run(run_dir, tmp_path):
    folder = Predictor.from_run(run_dir).save_pretrained(tmp_path)
    card, results = (folder / "README.md").read_text(), json.loads((run_dir / "results.json").read_text())
    assert card.startswith("---\nlibrary_name: cocoop_fast\n") and "# CoCoOp on demo" in card
    for subset, one in results["evaluations"].items():
        assert f"| {subset} | {one['total']} | {one['accuracy']:.1f} % | {one['macro_f1']:.1f} % |" in card
    for text in (
        "digit zero",
        "Not trained on: 5 classes (digit five",
        "seed 1; 4 steps",
        "arXiv:2203.05557",
    ):
        assert text in card
    stored = json.loads((folder / "config.json").read_text())
    assert stored["fingerprint"]["float16"] in card and stored["clip"] == "demo"
    assert stored["classnames"] == [f"digit {word}" for word in ["zero", "one", "two", "three", "four"]]


@pytest.mark.parametrize("kind", [CustomCLIP, CoOp])
def test_from_a_model_and_back(kind, tmp_path):
    model, image = custom(kind=kind), torch.rand(2, 3, 32, 32)
    save_pretrained(model, tmp_path)
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == dict(model.prompt_learner.named_parameters()).keys()
    )
    predictor = Predictor.from_pretrained(tmp_path, clip_model=tiny_clip())
    assert type(predictor.model) is kind and torch.equal(predictor.model(image), model(image))
    other = kind(reference_cfg(ctx_init="", n_ctx=4, precision="fp32", image_size=32), NAMES, tiny_clip())
    load_pretrained(other, tmp_path)
    other.prompt_learner.eval()
    assert torch.allclose(other(image), model(image), atol=1e-6)
    with pytest.raises(
        UserError, match="learned on a CLIP without a name, which has to be loaded first; give `clip_model`"
    ):
        Predictor.from_pretrained(tmp_path)


class Own(Learner):
    def __init__(self, classnames):
        super().__init__()
        self.ctx = torch.nn.Parameter(torch.randn(2, 48, generator=torch.Generator().manual_seed(3)))
        self.layout = layout_of_segments(classnames, [Context(2), CLASS_NAME, "."])

    def contexts(self, image_features):
        return self.ctx


def test_a_learner_of_ones_own(tmp_path):
    model = LearnedPromptCLIP(tiny_clip(), Own(NAMES))
    save_pretrained(model, tmp_path)
    again = LearnedPromptCLIP(tiny_clip(), Own(NAMES))
    with torch.no_grad():
        again.prompt_learner.ctx.zero_()
    load_pretrained(again, tmp_path)
    assert torch.equal(again.prompt_learner.ctx, model.prompt_learner.ctx)
    with pytest.raises(
        UserError, match=r"a learner of somebody's own; build it, and use cocoop_fast.load_pretrained"
    ):
        Predictor.from_pretrained(tmp_path)


def test_the_file_of_weights_is_named_without_its_place(tmp_path):
    weights = tmp_path / "somewhere" / "mine.pt"
    weights.parent.mkdir()
    weights.touch()
    folder = save_pretrained(custom(), tmp_path / "shared", clip=ModelConfig("ViT-B-16", str(weights)))
    assert "somewhere" not in "".join(path.read_text(errors="replace") for path in folder.iterdir())
    with pytest.raises(UserError, match=r"learned on ViT-B-16 \(mine.pt\), which has to be loaded first"):
        Predictor.from_pretrained(folder)


def test_another_clip_is_refused(tmp_path):
    save_pretrained(custom(), tmp_path)
    other = custom(tiny_clip(seed=1))
    before = other.prompt_learner.ctx.clone()
    message = r"and this CLIP has other weights \(fingerprint [0-9a-f]{12} there, [0-9a-f]{12} here\); load the CLIP"
    with pytest.raises(UserError, match=message):
        load_pretrained(other, tmp_path)
    assert torch.equal(other.prompt_learner.ctx, before)
    with pytest.raises(UserError, match=message):
        Predictor.from_pretrained(tmp_path, clip_model=tiny_clip(seed=1))


def test_fingerprints_know_every_weight_and_no_precision():
    model, low = tiny_clip(), tiny_clip()
    first = fingerprint(model)
    assert fingerprint(tiny_clip(dtype=torch.float64)) == first
    convert_weights_to_lp(low, dtype=torch.float16)
    assert fingerprint(low) == {"float16": first["float16"]}
    low = tiny_clip()
    convert_weights_to_lp(low, dtype=torch.bfloat16)
    assert fingerprint(low) == {"bfloat16": first["bfloat16"]}
    for name in ("visual.conv1.weight", "ln_final.bias", "logit_scale", "token_embedding.weight"):
        changed = tiny_clip()
        with torch.no_grad():
            dict(changed.named_parameters())[name].view(-1)[0] += 0.1
        assert fingerprint(changed)["float16"] != first["float16"], name
    assert fingerprint(tiny_clip(quick_gelu=False)) != first
    assert fingerprint(tiny_openai_clip()) != first


def test_what_cannot_be_told_is_warned_about(tmp_path):
    low, bf = tiny_clip(), tiny_clip()
    convert_weights_to_lp(low, dtype=torch.float16)
    convert_weights_to_lp(bf, dtype=torch.bfloat16)
    save_pretrained(custom(low), tmp_path)
    load_pretrained(custom(), tmp_path)
    with pytest.warns(
        UserWarning, match="on weights in float16, and this CLIP is in bfloat16, so that it cannot be told"
    ):
        load_pretrained(custom(bf), tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "no learned prompt of cocoop_fast"),
        (lambda folder: (folder / "config.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "is damaged"),
        (lambda folder: changed(folder, version=2), "of format 2, and this version reads 1"),
        (lambda folder: changed(folder, classnames=7), "is damaged"),
        (lambda folder: changed(folder, prompt={"method": "svm"}), "is damaged"),
    ],
)
def test_damage(damage, message, tmp_path):
    save_pretrained(custom(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_pretrained(custom(), tmp_path)


def changed(folder, **values):
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **values}))


def test_what_does_not_fit(tmp_path):
    save_pretrained(custom(ctx_init="", csc=True, kind=CoOp), tmp_path)
    with pytest.raises(
        UserError, match=r"belongs to the 3 classes that it was trained on \(red fox, polar bear, wolf\)"
    ):
        load_pretrained(custom(ctx_init="", csc=True, kind=CoOp, names=["a", "b", "c"]), tmp_path)
    with pytest.raises(UserError, match="learned with csc True, and this model has False"):
        load_pretrained(custom(kind=CoOp), tmp_path)
    save_pretrained(custom(), tmp_path)
    with pytest.raises(
        UserError, match=r"also has meta_net.linear1.bias, .*: it was trained with another method"
    ):
        load_pretrained(custom(kind=CoOp), tmp_path)
    with pytest.raises(UserError, match="learns nothing, so there is nothing to share"):
        save_pretrained(ZeroShot("a {}.", NAMES, tiny_clip()), tmp_path)
    with pytest.raises(UserError, match="There is no folder /nowhere, and it is no repository of the hub"):
        load_pretrained(custom(), "/nowhere")


def test_by_way_of_the_hub(run_dir, hub, tmp_path):
    predictor = Predictor.from_run(run_dir)
    address = predictor.push_to_hub("somebody/digits", token="hf_secret")
    assert address.endswith("/somebody/digits") and hub.tokens == {"Bearer hf_secret"}
    assert sorted(hub.repositories["somebody/digits"]) == ["README.md", "config.json", "model.safetensors"]
    images = write_images(tmp_path / "images", 2)
    for place in ("somebody/digits", "hf-hub:somebody/digits"):
        assert Predictor.from_pretrained(place).predict(images) == predictor.predict(images)
    with pytest.raises(
        UserError,
        match=r"no folder somebody/else, and config.json of somebody/else could not be had from the",
    ):
        Predictor.from_pretrained("somebody/else")


def test_a_hub_that_refuses_or_is_not_there(run_dir, hub, monkeypatch):
    hub.refuse = 403
    with pytest.raises(UserError, match=r"somebody/digits could not be uploaded: .*403.*hf auth login"):
        Predictor.from_run(run_dir).push_to_hub("somebody/digits", token="hf_secret")
    hubs._asked.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be reached \(.*\), so nothing is uploaded"):
        Predictor.from_run(run_dir).push_to_hub("somebody/digits")
    hubs._asked.cache_clear()


def test_on_the_command_line(run_dir, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder, [image] = tmp_path / "shared", write_images(tmp_path / "images", 1)
    assert (
        cli.run(["checkpoint", "share", str(run_dir), "-o", str(folder), "--push", "me/digits", "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(folder) and told["address"].endswith("/me/digits")
    answers = []
    for place in (str(run_dir), str(folder), "hf-hub:me/digits"):
        assert cli.run(["predict", str(image), "--run", place, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["predictions"])
    probabilities = [[one["probability"] for one in answer[0]["classes"]] for answer in answers]
    assert np.allclose(probabilities[1:], probabilities[0], atol=1e-6)
    assert cli.run(["checkpoint", "share", str(run_dir)]) == 2
    assert "--output FOLDER, or --push OWNER/NAME" in capsys.readouterr().err


def test_the_names_are_at_the_top():
    assert {"save_pretrained", "load_pretrained"} <= set(cocoop_fast.__all__)
