"""CLIP weights in every format that there is: files of open_clip and OpenAI, TorchScript, folders and hubs."""

from __future__ import annotations

import json
import pickle
import zipfile

import huggingface_hub
import open_clip
import pytest
import torch
from comparison import assert_close
from safetensors.torch import save_file
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import ClassTree, TreeTextEncoder, UserError
from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.clip.load import load_clip
from cocoop_fast.config import ModelConfig
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.reference import encode_prompts

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 3}
VISION = {
    "tiny-vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": IMAGE_SIZE},
    "tiny-rn": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": IMAGE_SIZE},
}
CONFIGS = {name: {"embed_dim": 64, "vision_cfg": vision, "text_cfg": TEXT} for name, vision in VISION.items()}
SIZES = {"input_resolution": IMAGE_SIZE, "context_length": 77, "vocab_size": 49408}


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    """Make the tiny architectures known to open_clip, with GELU as its own are."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


def with_sizes(model):
    for name, size in SIZES.items():
        vars(model).pop(name, None)  # open_clip has some of them as plain numbers
        model.register_buffer(name, torch.tensor(size))
    return model


def openai_state(model):
    return {**model.half().state_dict(), **{name: torch.tensor(size) for name, size in SIZES.items()}}


def script(model, path):
    image = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=model.logit_scale.dtype)
    inputs = (image, torch.zeros(1, 77, dtype=torch.int64))
    torch.jit.trace(model, inputs, check_trace=False).save(path)


# By name: how the file is written, and whether its model has QuickGELU whatever the architecture says.
FORMATS = {
    "open_clip.pt": (lambda model, path: torch.save(model.state_dict(), path), False),
    "trained.pt": (
        lambda model, path: torch.save(
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path
        ),
        False,
    ),
    "open_clip.safetensors": (lambda model, path: save_file(model.state_dict(), path), False),
    "before-1.6.pt": (
        lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
        False,
    ),
    "openai.pt": (lambda model, path: torch.save(openai_state(model), path), True),
    "openai-script.pt": (lambda model, path: script(with_sizes(model.half()), path), True),
    "open_clip-script.pt": (script, False),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("file", FORMATS)
def test_formats(name, file, tmp_path):
    write, by_openai = FORMATS[file]
    model = tiny_clip(resnet=name == "tiny-rn", quick_gelu=by_openai)
    path = tmp_path / file
    write(model, path)
    loaded = load_clip(ModelConfig(name=name, pretrained=str(path), device="cpu")).model
    image = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    prompts = tokenize_prompts(["cat", "tabby cat"], n_ctx=2)
    model = model.float()
    assert_close(loaded.visual(image), model.visual(image), 1e-6, "image features")
    # By the engine, too: the text tower is causal and EOT-pooled, with the activation of its format.
    assert FrozenCLIP(loaded).activation == ("quick_gelu" if by_openai else "gelu")
    ctx = torch.randn(1, 2, 48)
    embedding = model.token_embedding(prompts.tokens)
    embedding[:, 1:3] = ctx
    expected = encode_prompts(model, embedding, prompts.tokens)
    features = TreeTextEncoder(loaded, ClassTree(prompts.tokens, 2))(ctx)[0]
    assert_close(features, expected, 1e-5, "text features")


def test_a_script_is_not_run(tmp_path, monkeypatch):
    """Neither by torch, nor by the pickle in it, which here would leave a file behind."""
    path, trace = tmp_path / "script.pt", tmp_path / "trace"

    class Payload:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps({"weight": Payload()}, protocol=2))
        archive.writestr("script/constants.pkl", pickle.dumps(()))
    monkeypatch.setattr(torch.jit, "load", pytest.fail)
    with pytest.raises(UserError, match="could not be loaded"):
        load_clip(ModelConfig(name="tiny-vit", pretrained=str(path), device="cpu"))
    assert not trace.exists()


def test_weights_of_another_architecture_are_refused(tmp_path):
    for file in ("openai.pt", "open_clip.pt"):
        FORMATS[file][0](tiny_clip(), tmp_path / file)
        with pytest.raises(
            UserError, match=r"model 'tiny-rn' could not be loaded: \d+ of the weights are missing"
        ):
            load_clip(ModelConfig(name="tiny-rn", pretrained=str(tmp_path / file), device="cpu"))


def write_folder(folder):
    model = tiny_clip(quick_gelu=True)
    config = {**CONFIGS["tiny-vit"], "quick_gelu": True}
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def test_a_folder_with_architecture_and_weights(tmp_path):
    model = write_folder(tmp_path)
    loaded = load_clip(ModelConfig(name=f"local-dir:{tmp_path}", device="cpu"))
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert_close(loaded.model.visual(image), model.visual(image), 1e-6)
    assert (loaded.mean, loaded.std, loaded.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), IMAGE_SIZE)
    with pytest.raises(UserError, match="comes with its weights; leave --pretrained out"):
        load_clip(ModelConfig(name=f"local-dir:{tmp_path}", pretrained="openai"))


def test_a_hub(tmp_path, monkeypatch):
    """What was downloaded before, without a network: architecture and weights by --model, weights alone by --pretrained."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    model = write_folder(snapshot)
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)

    loaded = load_clip(ModelConfig(name="tiny-vit", pretrained="hf-hub:someone/tiny", device="cpu")).model
    assert not loaded.training
    assert loaded.visual.conv1.weight.equal(model.visual.conv1.weight)
    loaded = load_clip(ModelConfig(name="hf-hub:someone/tiny", device="cpu")).model
    assert_close(loaded.visual(image), model.visual(image), 1e-6)

    # open_clip alone would go on with random weights.
    (snapshot / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="model 'hf-hub:someone/tiny' could not be loaded"):
        load_clip(ModelConfig(name="hf-hub:someone/tiny", device="cpu"))


def test_another_tokenizer_is_refused(tmp_path):
    write_folder(tmp_path)
    config = {**CONFIGS["tiny-vit"], "text_cfg": {**TEXT, "vocab_size": 100}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(tiny_clip(vocab_size=100).state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="knows 100 tokens, so it was not trained with CLIP's tokenizer"):
        load_clip(ModelConfig(name=f"local-dir:{tmp_path}", device="cpu"))


@pytest.mark.parametrize(("width", "heads", "embed_dim"), [(640, 10, 640), (768, 12, 512), (256, 8, 96)])
def test_widths_and_heads(width, heads, embed_dim):
    """RN50x4's and others': nothing takes 512 dimensions or heads of 64 for granted."""
    model = tiny_clip(resnet=True, width=width, heads=heads, embed_dim=embed_dim, layers=2)
    double = tiny_clip(
        resnet=True, width=width, heads=heads, embed_dim=embed_dim, layers=2, dtype=torch.float64
    )
    tokens = tokenize_prompts(["cat", "tabby cat", "tabby"], n_ctx=3).tokens
    ctx = 0.5 * torch.randn(1, 3, width)
    embedding = double.token_embedding(tokens)
    embedding[:, 1:4] = ctx
    expected = encode_prompts(double, embedding, tokens)
    for backend, tolerance, one in (("torch", 1e-10, double), ("auto", 1e-5, model)):
        features = TreeTextEncoder(one, ClassTree(tokens, 3), backend=backend)(ctx)
        assert_close(features[0], expected, tolerance, f"{backend} backend")
