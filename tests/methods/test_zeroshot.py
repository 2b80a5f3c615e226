"""Zero-shot CLIP with template ensembles."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from open_clip import tokenize
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from tiny_models import tiny_clip

from cocoop_fast import UserError
from cocoop_fast.config import from_mapping
from cocoop_fast.data import load_dataset
from cocoop_fast.methods import ZeroShot
from cocoop_fast.methods.zeroshot import ensemble_templates
from cocoop_fast.runs.recipe import resolve

NAMES = ["cat", "tabby cat", "digit_zero"]


def test_the_lists_are_the_published_ones():
    published = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    assert ensemble_templates("imagenet", "") == tuple(published)
    select = ensemble_templates("select", "{} texture.")
    assert sorted(select[:-1]) == sorted(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)
    assert select[-1] == "{} texture." and len(select) == 8
    assert ensemble_templates("none", "{} texture.") == ("{} texture.",)


@pytest.mark.parametrize(
    "templates", [ensemble_templates("select", "{} texture."), ["a {}.", "{}!", "{}, a {}"[:6]]]
)
def test_an_ensemble_is_the_mean_of_unit_features(templates):
    model = tiny_clip(dtype=torch.float64)
    image = torch.randn(3, 64, dtype=torch.float64)
    mean = torch.zeros(3, 64, dtype=torch.float64)
    for template in templates:  # by the model's own encoder
        text = model.encode_text(tokenize([template.format(name.replace("_", " ")) for name in NAMES]))
        mean = mean + text / text.norm(dim=-1, keepdim=True) / len(templates)
    mean = mean / mean.norm(dim=-1, keepdim=True)
    expected = model.logit_scale.exp() * image / image.norm(dim=-1, keepdim=True) @ mean.T
    zero_shot = ZeroShot(templates, NAMES, model).eval()
    assert_close(zero_shot.forward_features(image), expected, 1e-12)


def test_other_class_names_at_run_time():
    model = tiny_clip()
    zero_shot = ZeroShot("a {}.", NAMES, model).eval()
    zero_shot.set_classnames(["dog", "blue whale"])
    image = torch.randn(2, 64)
    assert zero_shot.forward_features(image).equal(
        ZeroShot("a {}.", ["dog", "blue whale"], model).eval().forward_features(image)
    )
    assert zero_shot.n_classes == 2


def test_bad_templates_are_refused():
    with pytest.raises(UserError, match="at least one template"):
        ZeroShot([], NAMES, tiny_clip())
    with pytest.raises(UserError, match=r"'{} and {}' must contain {} once"):
        ZeroShot(["a {}.", "{} and {}"], NAMES, tiny_clip())


@pytest.mark.parametrize(
    ("name", "ensemble", "template"),
    [
        ("digits", "none", "a photo of a {}."),
        ("digits", "select", "a photo of a {}."),
        ("imagenet", "select", ""),
        ("imagenet", "none", "a photo of a {}."),
    ],
)
def test_imagenet_alone_has_no_template_beside_the_ensemble(name, ensemble, template):
    config = from_mapping({"prompt": {"method": "zeroshot", "ensemble": ensemble}})
    dataset = load_dataset(config.data)
    object.__setattr__(dataset, "name", name)
    assert resolve(config, dataset).prompt.template == template
