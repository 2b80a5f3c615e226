"""Names as people type them, of models, data sets and methods: taken or suggested whatever their case and punctuation."""

from __future__ import annotations

import pytest

from cocoop_fast import UserError
from cocoop_fast.cli import configuration, options
from cocoop_fast.clip.load import check_architecture, load_clip
from cocoop_fast.config import ModelConfig
from cocoop_fast.data.registry import REGISTRY, canonical_name
from cocoop_fast.spelling import meant, near, spelling


def test_case_and_punctuation_do_not_count():
    assert meant("vit-b/16", ["ViT-B-32", "ViT-B-16"]) == "ViT-B-16"
    assert meant("vit-b-17", ["ViT-B-32", "ViT-B-16"]) is None
    assert near("VITB17", ["RN50", "ViT-B-16", "ViT-B-17-plus"], 2)[0] == "ViT-B-16"
    assert near("abacus", ["ViT-B-16"]) == []


@pytest.mark.parametrize("typed", ["ViT-B/16", "vit-b/16", "VIT_B/16", "vitb/16"])
def test_openais_names_in_any_spelling(typed):
    model = configuration.build(options={"model.name": ("--model", typed)}).config.model
    assert (model.name, model.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert options.problem_spec(("a", "b"), 1, typed, None).model == "ViT-B-16-quickgelu"


@pytest.mark.parametrize(
    "typed, suggested",
    [
        ("vit-b-16", "ViT-B-16"),
        ("vit_l_14_336", "ViT-L-14-336"),
        ("rn50", "RN50"),
        ("Demo", "demo"),
        ("ViT-B/16-SigLIP", "ViT-B-16-SigLIP"),
    ],
)
def test_architectures_are_suggested(typed, suggested):
    with pytest.raises(UserError, match=rf"did you mean {suggested}\?"):
        check_architecture(typed)


def test_tags_are_suggested():
    with pytest.raises(
        UserError, match=r"no weights tagged 'OpenAI'; did you mean openai\? The tags are: openai"
    ):
        load_clip(ModelConfig(name="ViT-B-16-quickgelu", pretrained="OpenAI", device="cpu"))


@pytest.mark.parametrize("typed", ["oxford_pets", "Oxford-Pets", "OxfordPets", "oxford pets", "OXFORDPETS"])
def test_data_sets_in_any_spelling(typed):
    assert canonical_name(typed) == "oxford_pets"


def test_data_sets_are_suggested():
    with pytest.raises(
        UserError, match=r"called 'oxford_pet'; did you mean oxford_pets\? The sets are digits"
    ):
        canonical_name("oxford_pet")


@pytest.mark.parametrize(
    "typed, method", [("CoCoOp", "cocoop"), ("Zero-Shot", "zeroshot"), ("linear_probe", "linear-probe")]
)
def test_methods_in_any_spelling(typed, method, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"prompt:\n  method: {typed}\n")
    for built in (
        configuration.build(options={"prompt.method": ("--method", typed)}),
        configuration.build(pairs=("prompt.method", typed)),
        configuration.build(files=[file]),
    ):
        assert built.config.prompt.method == method
    assert options.methods_of(f"{typed},coop", "--methods") == (method, "coop")


def test_methods_are_suggested():
    with pytest.raises(
        UserError, match=r"no method 'cocop'; did you mean cocoop\? The methods are cocoop, coop"
    ):
        options.methods_of("cocop", "--methods")


def test_no_two_of_our_names_are_spelled_alike():
    for names in (REGISTRY, options.METHODS):
        assert len({spelling(name) for name in names}) == len(names)
