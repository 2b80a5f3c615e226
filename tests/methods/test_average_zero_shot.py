"""The mean of learned prompts' logits and zero-shot CLIP's: what classifies does so, and training is as without."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from comparison import assert_close
from tiny_models import tiny_clip
from tiny_runs import loaded_tiny_clip, use_tiny_clip

from cocoop_fast import UserError, cli, save_pretrained
from cocoop_fast.config import PromptConfig
from cocoop_fast.evaluation.shortlist import ShortlistClassifier
from cocoop_fast.experiments.experiment import evaluate_run
from cocoop_fast.experiments.onnx_export import _Classifier
from cocoop_fast.methods import build_model
from cocoop_fast.reference import zero_shot_logits

NAMES = ["cat", "old dog", "digit one", "tabby cat"]
OTHERS = ["horse", "dog", "digit two"]
TEMPLATE = "a drawing of the {}."
LEARNERS = ("coop", "cocoop", "meta-nets")


def models(method, dtype=torch.float64):
    """The same learned parameters without and with averaging."""
    clip = replace(loaded_tiny_clip(), model=tiny_clip(layers=2).to(dtype))
    built = []
    for averaged in (False, True):
        torch.manual_seed(5)
        prompt = PromptConfig(method=method, average_zero_shot=averaged, template=TEMPLATE)
        model = build_model(prompt, NAMES, clip, backend="torch")
        for parameter in model.prompt_learner.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        built.append(model)
    return clip, *built


def features(batch=3, dtype=torch.float64):
    return torch.randn(batch, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("method", LEARNERS)
def test_logits_are_the_mean_of_both_and_training_is_as_without(method):
    clip, plain, averaged = models(method)
    x, label = features(), torch.tensor([0, 3, 1])
    losses = [model.loss_and_logits(x, label) for model in (plain, averaged)]
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])
    for names in (NAMES, OTHERS):
        for model in (plain, averaged):
            model.set_classnames(names)
            model.eval()
        with torch.no_grad():
            expected = (plain.forward_features(x) + zero_shot_logits(clip.model, x, names, TEMPLATE)) / 2
            found = averaged.forward_features(x)
        assert_close(found, expected, 1e-10, f"logits over {len(names)} classes")
        assert not torch.allclose(found, plain.forward_features(x))


def test_an_ensemble_is_that_of_zero_shot_clip():
    clip = loaded_tiny_clip()
    prompt = PromptConfig(average_zero_shot=True, template=TEMPLATE, ensemble="select")
    both = [build_model(replace(prompt, method=method), NAMES, clip) for method in ("coop", "zeroshot")]
    assert torch.equal(both[0].averaged_with, both[1].mean_features)


def test_shortlists_and_exported_classifiers_average_too():
    _, _, averaged = models("cocoop", torch.float32)
    averaged.eval()
    x = features(dtype=torch.float32)
    with torch.no_grad():
        expected = averaged.forward_features(x)
        assert_close(ShortlistClassifier(averaged, len(NAMES)).forward_features(x), expected, 1e-5, "all")
        short = ShortlistClassifier(averaged, 2).forward_features(x)
        kept = short.isfinite()
        assert kept.sum(dim=1).tolist() == [2, 2, 2]
        assert_close(short[kept], expected[kept], 1e-5, "shortlisted")
        image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        for method in ("coop", "cocoop"):
            _, _, model = models(method, torch.float32)
            model.eval()
            assert_close(_Classifier(model)(image), model(image), 1e-5, method)


def test_shared_without_its_prompts_it_is_refused(tmp_path):
    _, plain, averaged = models("cocoop", torch.float32)
    save_pretrained(plain, tmp_path / "plain")
    with pytest.raises(UserError, match="share its run instead"):
        save_pretrained(averaged, tmp_path / "averaged")


def test_a_finished_run_can_be_averaged_afterwards(tmp_path, monkeypatch, capsys):
    use_tiny_clip(monkeypatch)
    call = ["train", "-q", "--shots", "1", "optim.epochs", "1", "--method"]
    assert cli.run([*call, "cocoop", "-o", str(tmp_path / "plain")]) == 0
    assert (
        cli.run([*call, "cocoop+zero-shot", "-o", str(tmp_path / "averaged"), "--compare", "zeroshot"]) == 0
    )
    before = (tmp_path / "plain" / "results.json").read_bytes()
    row = json.loads((tmp_path / "averaged" / "results.json").read_text())["rows"][0]
    assert row["method"] == "cocoop+zero-shot"
    capsys.readouterr()
    assert cli.run(["eval", str(tmp_path / "plain"), "--average-zero-shot", "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["average_zero_shot"] is True
    assert {name: one["accuracy"] for name, one in said["results"].items()} == {
        "base": row["base"],
        "new": row["new"],
    }
    evaluate_run(tmp_path / "plain", average_zero_shot=True, shortlist=2, subset="base")
    assert (tmp_path / "plain" / "results.json").read_bytes() == before  # which are the plain method's
    assert cli.run(["eval", str(tmp_path / "averaged" / "zeroshot"), "--average-zero-shot", "-q"]) == 2
    assert "is for learned prompts, and zeroshot has none" in capsys.readouterr().err
