"""Layers of configuration: what wins, what is implied, what is refused."""

import pytest

from cocoop_fast.cli import configuration, options
from cocoop_fast.cli.train import methods_to_compare
from cocoop_fast.config import RunConfig, to_mapping
from cocoop_fast.errors import UserError


def test_nothing_said_is_the_default():
    built = configuration.build()
    assert built.config == RunConfig()
    assert built.is_default_experiment


def test_later_layers_win(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("optim: {lr: 0.1, momentum: 0.1, weight_decay: 0.1, epochs: 1}")
    second.write_text("optim: {momentum: 0.2, weight_decay: 0.2, epochs: 2}")
    built = configuration.build(
        files=[first, second],
        options={"optim.weight_decay": ("--weight-decay", 0.3), "optim.epochs": ("--epochs", 3)},
        pairs=["TRAINER.NAME", "CoCoOp", "OPTIM.MAX_EPOCH", "4"],
    )
    optim = built.config.optim
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.epochs) == (0.1, 0.2, 0.3, 4)
    assert not built.is_default_experiment


def test_a_section_without_a_line_says_nothing(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim:\n  # epochs: 3\ndata:\nseed: 2\n")
    built = configuration.build(files=[file])
    assert built.said == {"seed"} and built.config.seed == 2


def test_home_is_meant_by_a_tilde_wherever_a_shell_does_not_see_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    file = tmp_path / "photos.yaml"
    file.write_text("data: {root: ~/photos}\noutput_dir: ~/run")
    config = configuration.build(files=[file]).config
    assert (config.data.root, config.output_dir) == (tmp_path / "photos", tmp_path / "run")
    config = configuration.build(options={"data.root": ("--root", "~/photos")}).config
    assert (config.data.root, config.data.name) == (tmp_path / "photos", "folder")


def test_a_written_configuration_reads_back_the_same(tmp_path):
    import yaml

    config = configuration.build(
        pairs=["prompt.ctx_init", "", "augment.crop_scale", "[0.5, 1]", "seed", "3"]
    ).config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_mapping(config)))
    assert configuration.build(files=[path]).config == config


def test_our_fields_and_the_references_keys_in_one_file(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text("OPTIM: {LR: 0.5}\nprompt: {method: coop, ctx_init: a sketch of a}\n")
    config = configuration.build(files=[path]).config
    assert (config.optim.lr, config.prompt.ctx_init) == (0.5, "a sketch of a")


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3"])
def test_numbers_in_any_spelling(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"optim: {{lr: {text}}}")
    assert configuration.build(files=[path]).config.optim.lr == 0.001
    assert configuration.build(pairs=["optim.lr", text]).config.optim.lr == 0.001


def test_text_fields_stay_text():
    assert configuration.build(pairs=["prompt.ctx_init", "yes"]).config.prompt.ctx_init == "yes"
    assert configuration.build(pairs=["prompt.ctx_init", "007"]).config.prompt.ctx_init == "007"
    assert configuration.build(pairs=["prompt.template", "null"]).config.prompt.template is None


def test_a_length_alone_asks_for_random_vectors():
    prompt = configuration.build(options={"prompt.n_ctx": ("--n-ctx", 8)}).config.prompt
    assert (prompt.n_ctx, prompt.ctx_init) == (8, "")


def test_a_length_that_the_words_contradict_is_told():
    built = configuration.build(pairs=["prompt.n_ctx", "8", "prompt.ctx_init", "a photo of a"])
    assert built.config.prompt.ctx_init == "a photo of a"
    assert "n_ctx 8 is not used" in built.warnings[0]


def test_a_root_implies_a_folder(tmp_path):
    assert configuration.build(options={"data.root": ("--root", tmp_path)}).config.data.name == "folder"


def test_openais_name_brings_its_weights():
    model = configuration.build(options={"model.name": ("--model", "ViT-B/32")}).config.model
    assert (model.name, model.pretrained) == ("ViT-B-32-quickgelu", "openai")


def test_another_architecture_drops_the_weights_of_the_first(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: ViT-B-32, pretrained: laion2b_s34b_b79k}")
    assert configuration.build(files=[path], pairs=["model.name", "demo"]).config.model.pretrained is None
    assert configuration.build(files=[path]).config.model.pretrained == "laion2b_s34b_b79k"


def test_comparison_is_on_only_if_nothing_was_said():
    default, other = configuration.build(), configuration.build(pairs=["data.shots", "4"])
    seeded = configuration.build(pairs=["seed", "4", "output_dir", "somewhere"])
    assert methods_to_compare(None, False, default) == ("zeroshot", "coop")
    assert methods_to_compare(None, False, seeded) == ("zeroshot", "coop")
    assert methods_to_compare(None, True, default) == ()
    assert methods_to_compare(None, False, other) == ()
    assert methods_to_compare("all", False, other) == ("zeroshot", "coop")
    assert methods_to_compare("zeroshot, CoCoOp", False, other) == ("zeroshot",)
    with pytest.raises(UserError, match="exclude each other"):
        methods_to_compare("all", True, default)
    with pytest.raises(UserError, match="no method 'prograd'"):
        methods_to_compare("prograd", False, default)


def test_pairs_may_be_joined_by_an_equals_sign():
    config = configuration.build(
        pairs=[
            "optim.lr=0.01",
            "optim.momentum",
            "0.8",
            "OPTIM.MAX_EPOCH=5",
            "TRAINER.NAME=CoCoOp",
            "prompt.template=a {} = b",
            "data.shots=4",
        ]
    ).config
    assert (config.optim.lr, config.optim.momentum, config.optim.epochs) == (0.01, 0.8, 5)
    assert (config.prompt.template, config.data.shots) == ("a {} = b", 4)
    assert configuration.build(pairs=["prompt.template", "a {} = b"]).config.prompt.template == "a {} = b"
    assert configuration.build(pairs=["prompt.ctx_init="]).config.prompt.ctx_init == ""
    with pytest.raises(UserError, match=r"`optim\.lrr` is not a known field; did you mean optim\.lr"):
        configuration.build(pairs=["optim.lrr=1"])
    joined = options.join_lists(["run", "--seeds", "1", "2", "optim.lr=0.01"])
    assert joined == ["run", "--seeds", "1,2", "optim.lr=0.01"]
