"""Where weights come from decides how they are computed: activation, names, text positions, preprocessing."""

from __future__ import annotations

import json
import socket
import time

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from clip_sources import (
    CONFIG,
    NAME,
    UNKNOWN_ACTIVATION,
    VISION,
    add_architectures,
    assert_same_features,
    ignore_assumptions,
    load,
)
from comparison import assert_close
from PIL import Image
from safetensors.torch import save_file
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import UserError
from cocoop_fast.clip import hub
from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.clip.load import check_architecture
from cocoop_fast.evaluation import evaluate
from cocoop_fast.prompts.tokens import tokenize_prompts


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    add_architectures(tmp_path_factory.mktemp("configs"))


# The activation belongs to the weights.


@pytest.fixture
def tag(tmp_path, monkeypatch):
    """Publish weights under a tag, as open_clip has them."""

    def publish(model, name, **record):
        path = tmp_path / f"{name}.safetensors"
        save_file(model.state_dict(), path)
        tags = open_clip.pretrained._PRETRAINED.get(NAME, {})
        record = {"file": str(path), "mean": (0.5,) * 3, "std": (0.5,) * 3, **record}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {**tags, name: record})

    return publish


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_tag_is_computed_with_the_activation_that_it_was_trained_with(tag, quick_gelu):
    model = tiny_clip(quick_gelu=quick_gelu)
    tag(model, "openai", quick_gelu=quick_gelu)
    loaded = load(NAME, "openai").model
    assert FrozenCLIP(loaded).activation == ("quick_gelu" if quick_gelu else "gelu")
    assert_same_features(loaded, model)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("architecture", [NAME, f"{NAME}-quickgelu"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_configuration_beside_the_weights_names_the_activation(tmp_path, architecture, quick_gelu, given):
    model = tiny_clip(quick_gelu=quick_gelu)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**CONFIG, "quick_gelu": quick_gelu}})
    )
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    pretrained = tmp_path if given == "folder" else tmp_path / "open_clip_model.safetensors"
    assert_same_features(load(architecture, pretrained).model, model)


def test_an_assumed_activation_is_told(tmp_path, recwarn):
    save_file(tiny_clip().state_dict(), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=rf"GELU is assumed.*name the architecture {NAME}-quickgelu"):
        load(NAME, tmp_path / "w.safetensors")
    recwarn.clear()
    assert_same_features(load(f"{NAME}-quickgelu", tmp_path / "w.safetensors").model, tiny_clip())
    assert not recwarn.list


def test_an_unknown_tag_names_the_architecture_that_has_it():
    with pytest.raises(UserError, match="use --model ViT-B-32\\."):
        load("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


# CLIPModel of Hugging Face's transformers.


def hugging_face_state(model):
    """The names that ``CLIPModel.save_pretrained`` writes."""
    theirs = {
        "logit_scale": model.logit_scale,
        "text_projection.weight": model.text_projection.T,
        "visual_projection.weight": model.visual.proj.T,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.class_embedding": model.visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": model.visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": model.visual.positional_embedding,
    }
    for name, norm in (
        ("text_model.final_layer_norm", model.ln_final),
        ("vision_model.pre_layrnorm", model.visual.ln_pre),
        ("vision_model.post_layernorm", model.visual.ln_post),
    ):
        theirs |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    for tower, transformer in (
        ("text_model", model.transformer),
        ("vision_model", model.visual.transformer),
    ):
        for i, block in enumerate(transformer.resblocks):
            layer = f"{tower}.encoder.layers.{i}"
            for letter, weight, bias in zip(
                "qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
            ):
                theirs |= {
                    f"{layer}.self_attn.{letter}_proj.weight": weight,
                    f"{layer}.self_attn.{letter}_proj.bias": bias,
                }
            for name, module in (
                ("self_attn.out_proj", block.attn.out_proj),
                ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2),
                ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
            ):
                theirs |= {f"{layer}.{name}.weight": module.weight, f"{layer}.{name}.bias": module.bias}
    return {key: value.detach().clone().contiguous() for key, value in theirs.items()}


def hugging_face_config(activation="quick_gelu"):
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": 64,
        "text_config": {  # what equals the defaults of transformers is left out, as it writes it
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_attention_heads": 3,
            "num_hidden_layers": 3,
            "hidden_act": activation,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "hidden_act": activation,
        },
    }


PREPROCESSOR = {
    "size": {"shortest_edge": IMAGE_SIZE},
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 2,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def write_hugging_face(folder, model, activation="quick_gelu", file="model.safetensors"):
    (folder / "config.json").write_text(json.dumps(hugging_face_config(activation)))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    state = hugging_face_state(model)
    if file.endswith(".index.json"):
        names = list(state)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, keys in parts.items():
            save_file({key: state[key] for key in keys}, folder / part)
        index = {key: part for part, keys in parts.items() for key in keys}
        (folder / file).write_text(json.dumps({"weight_map": index}))
    elif file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file, {"format": "pt"})
    return folder / file


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_folder_of_hugging_face(tmp_path, file, activation):
    model = tiny_clip(quick_gelu=activation == "quick_gelu")
    path = write_hugging_face(tmp_path, model, activation, file)
    for name, pretrained in (
        (tmp_path, None),
        (f"local-dir:{tmp_path}", None),
        (NAME, tmp_path),
        (NAME, path),
    ):
        loaded = load(name, pretrained)
        assert_same_features(loaded.model, model)
        assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (loaded.resize_mode, loaded.interpolation) == ("shortest", "bilinear")


def test_a_hub_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--clip"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    model = tiny_clip()
    write_hugging_face(snapshot, model)
    assert_same_features(load("hf-hub:someone/clip").model, model)
    assert_same_features(load(NAME, "hf-hub:someone/clip").model, model)


def test_hugging_face_weights_without_configuration(tmp_path):
    model = tiny_clip()
    save_file(hugging_face_state(model), tmp_path / "clip.safetensors")
    with pytest.warns(UserWarning, match=UNKNOWN_ACTIVATION):
        load(NAME, tmp_path / "clip.safetensors")
    assert_same_features(load(f"{NAME}-quickgelu", tmp_path / "clip.safetensors").model, model)


def test_hugging_face_itself(tmp_path):
    """The same features as transformers computes, of a folder that it wrote."""
    transformers = pytest.importorskip("transformers")
    config = hugging_face_config()
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path).model
    image, tokens = (
        torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE),
        tokenize_prompts(["cat", "dog"], n_ctx=2).tokens,
    )
    with torch.no_grad():
        out = theirs(input_ids=tokens, pixel_values=image)
        assert_close(ours.encode_image(image, normalize=True), out.image_embeds, 1e-5)
        assert_close(ours.encode_text(tokens, normalize=True), out.text_embeds, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "is a 'siglip' model"),
        ({"text_config": {"hidden_act": "gelu"}}, "activations 'gelu' .* and 'quick_gelu'"),
        ({"vision_config": {"layer_norm_eps": 1e-3}}, "layer_norm_eps"),
    ],
)
def test_other_models_of_hugging_face_are_refused(tmp_path, change, message):
    write_hugging_face(tmp_path, tiny_clip())
    (tmp_path / "config.json").write_text(json.dumps({**hugging_face_config(), **change}))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_preprocessing_of_hugging_face_that_is_not_offered_is_refused(tmp_path):
    write_hugging_face(tmp_path, tiny_clip())
    for change in ({"resample": 1}, {"size": {"shortest_edge": 40}}, {"do_normalize": False}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **change}))
        with pytest.raises(UserError, match=r"preprocessing of .* is not supported"):
            load(tmp_path)


@pytest.fixture
def silent_hub(tmp_path, monkeypatch):
    """A hub that takes connections and never answers, which is the slowest way to have no network."""
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}"
    )
    monkeypatch.setattr(hub, "PATIENCE", 1.0)
    yield
    listener.close()


def test_without_a_network_a_tag_costs_one_sentence_and_seconds(silent_hub, capfd):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load("RN50", "yfcc15m")
    assert time.monotonic() - start < 10
    sentence = str(caught.value)
    assert "cannot be reached (" in sentence and "--pretrained FILE" in sentence and "the demo" in sentence
    assert "/timm/resnet50_clip.yfcc15m/resolve/main/open_clip_model.safetensors from" in sentence
    assert (
        sentence.endswith("docs/faq.md says how to work without a network).")
        and caught.value.exit_status == 1
    )
    assert not capfd.readouterr().err


def test_without_a_network_a_repository_costs_one_sentence(silent_hub):
    with pytest.raises(
        UserError, match=r"open_clip_config.json of someone/clip is not on this machine; bring"
    ):
        load("hf-hub:someone/clip")


def test_a_tag_that_is_on_the_disk_needs_no_network(silent_hub, monkeypatch, tmp_path):
    model = tiny_clip()
    commit = "0" * 40
    folder = tmp_path / "models--someone--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    save_file(model.state_dict(), folder / "snapshots" / commit / "open_clip_model.safetensors")
    record = {"hf_hub": "someone/tiny/", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"kept": record})
    assert_same_features(load(NAME, "kept").model, model)


def test_a_name_of_the_hub_is_told_how_to_be_given():
    with pytest.raises(UserError, match="hf-hub:openai/clip-vit-base-patch16"):
        check_architecture("openai/clip-vit-base-patch16")
    with pytest.raises(UserError, match="did you mean ViT-B-16"):
        check_architecture("vit-b/16")


# Text positions, images.


@ignore_assumptions
@pytest.mark.parametrize("length", [32, 77, 248])
def test_text_positions_are_taken_at_their_length(tmp_path, length):
    model = tiny_clip(quick_gelu=False, context_length=length)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = load(NAME, tmp_path / "w.pt").model
    assert loaded.positional_embedding.equal(model.positional_embedding)
    tokens = tokenize_prompts(["cat"], n_ctx=2, context_length=length).tokens
    assert_close(loaded.encode_text(tokens), model.encode_text(tokens), 1e-6)


@ignore_assumptions
def test_long_clip(tmp_path):
    """Its positions are kept twice: the first 20 are of one table, the rest of the other."""
    model = tiny_clip(quick_gelu=False, context_length=248)
    state = model.state_dict()
    table = state["positional_embedding"]
    first, rest = table.clone(), table.clone()
    first[20:], rest[:20] = 7, 7
    state |= {"positional_embedding": first, "positional_embedding_res": rest}
    torch.save(state, tmp_path / "longclip.pt")
    assert load(NAME, tmp_path / "longclip.pt").model.positional_embedding.equal(table)


def test_images_that_are_not_square_are_refused(tmp_path):
    config = {**CONFIG, "vision_cfg": {**VISION, "image_size": [32, 64]}}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config})
    )  # no weights are needed
    with pytest.raises(UserError, match="images of 32 x 64 pixels; only square images"):
        load(f"local-dir:{tmp_path}")


@ignore_assumptions
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_models_own_preprocessing(tmp_path, resize_mode, interpolation):
    """An image that is not square becomes what open_clip makes of it."""
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.5, 0.6, 0.7],
        "resize_mode": resize_mode,
        "interpolation": interpolation,
    }
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess})
    )
    save_file(tiny_clip(quick_gelu=False).state_dict(), tmp_path / "open_clip_model.safetensors")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 100, 3), dtype=np.uint8))
    theirs = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=IMAGE_SIZE, **preprocess), is_train=False
    )
    assert torch.equal(evaluate.test_transform(load(tmp_path))(image), theirs(image))
    assert torch.equal(evaluate.test_transform(load(NAME, tmp_path))(image), theirs(image))


def test_preprocessing_of_a_tag(tag):
    tag(tiny_clip(), "squashed", quick_gelu=True, resize_mode="squash", interpolation="bilinear")
    loaded = load(NAME, "squashed")
    assert (loaded.mean, loaded.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (loaded.resize_mode, loaded.interpolation) == ("squash", "bilinear")


def test_preprocessing_that_is_not_offered_is_refused(tag):
    tag(tiny_clip(), "longest", quick_gelu=True, resize_mode="longest")
    with pytest.raises(UserError, match="images with resize_mode 'longest'"):
        load(NAME, "longest")
