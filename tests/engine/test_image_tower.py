"""The frozen image tower against the model's own, in float64."""

import copy
import json

import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from tiny_models import _Block as OpenAIsBlock
from torch import nn

from cocoop_fast.cli import run
from cocoop_fast.config import from_mapping
from cocoop_fast.engine import image_tower
from cocoop_fast.engine.image_tower import FrozenViT
from cocoop_fast.errors import UserError
from cocoop_fast.experiments.shared import Shared

TINY = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}


def tower(seed=0, quick=False, **options):
    torch.manual_seed(seed)
    visual = _build_vision_tower(24, CLIPVisionCfg(**TINY | options), quick_gelu=quick)
    with torch.no_grad():
        for p in visual.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # biases are zero and scales one otherwise
    return visual.eval().requires_grad_(False)


def images(n=5):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def off(features, visual, image):
    expected = copy.deepcopy(visual).double()(image.double())
    return float((features - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quick": True},
        {"ls_init_value": 0.3},
        {"no_ln_pre": True},
        {"layers": 1},
        {"width": 96},
        {"patch_size": 32},
    ],
    ids=str,
)
def test_it_is_the_same_function(options, monkeypatch):
    """Of any number of images, more of them than go through the layers at once."""
    monkeypatch.setattr(image_tower, "ROWS_AT_ONCE", 40)
    visual = tower(**options)
    fast = FrozenViT(visual)
    for n in (1, 5):
        found = fast(images(n))
        assert found.shape == (n, 24)
        assert off(found, visual, images(n)) < 2e-6
    assert not torch.equal(found, visual(images()))  # so that it is not the tower itself that was called


def test_a_convolution_with_a_bias_and_images_of_any_layout():
    visual = tower()
    visual.conv1.bias = nn.Parameter(torch.randn(64), requires_grad=False)
    fast = FrozenViT(visual)
    image = images().contiguous(memory_format=torch.channels_last)
    assert off(fast(image), visual, image) < 2e-6


class OpenAIsViT(nn.Module):
    """The layout of OpenAI's `VisionTransformer`: blocks take (tokens, images, width)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=8, stride=8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(64) * 0.1)
        self.positional_embedding = nn.Parameter(torch.randn(17, 64) * 0.1)
        self.ln_pre, self.ln_post = nn.LayerNorm(64), nn.LayerNorm(64)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(
            *(OpenAIsBlock(64, 2, torch.zeros(17, 17)) for _ in range(2))
        )
        self.proj = nn.Parameter(torch.randn(64, 24) * 0.1)

    def forward(self, image):
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


def test_openai_s_tower_too():
    torch.manual_seed(0)
    visual = OpenAIsViT().eval().requires_grad_(False)
    assert off(FrozenViT(visual)(images()), visual, images()) < 2e-6


def test_what_asks_for_a_gradient_goes_through_the_tower():
    visual = tower()
    fast = FrozenViT(visual)
    image = images().requires_grad_()
    fast(image).square().sum().backward()
    assert image.grad.abs().max() > 0
    visual.ln_post.weight.requires_grad_()
    fast(images()).square().sum().backward()
    assert visual.ln_post.weight.grad.abs().max() > 0
    assert fast.double()(images().double()).dtype == torch.float64


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_change_are_packed_again(through_data):
    visual = tower()
    fast = FrozenViT(visual)
    before = fast(images())
    weight = visual.transformer.resblocks[1].mlp.c_fc.weight
    with torch.no_grad():
        weight.data.mul_(0.5) if through_data else weight.mul_(0.5)
    after = fast(images())
    assert off(after, visual, images()) < 2e-6
    assert not torch.allclose(before, after, atol=1e-3)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.visual.proj.mul_(2)
    torch.testing.assert_close(other(images()), 2 * after)
    torch.testing.assert_close(fast(images()), after)


@pytest.mark.parametrize(
    ("visual", "says"),
    [
        (lambda: tower(layers=(1, 1, 1, 1), width=8), "no `class_embedding`"),
        (lambda: tower(pool_type="avg"), "not read at its class token"),
        (lambda: tower(attentional_pool=True, attn_pooler_heads=2), "not read at its class token"),
        (lambda: tower(output_tokens=True), "returns tokens"),
        (lambda: tower(block_type="custom", qk_norm=True), "blocks of type"),
        (lambda: tower().double(), r"model\.image_backend: .*float64"),
    ],
)
def test_other_towers_are_refused(visual, says):
    with pytest.raises(UserError, match=says):
        FrozenViT(visual())


def test_a_tower_that_computes_something_else_is_found_out():
    """As forks do that add prompts of their own."""
    visual = tower()
    block = visual.transformer.resblocks[1]
    block.register_forward_hook(lambda module, inputs, out: out + 0.1 * out.roll(1, -1))
    with pytest.raises(UserError, match="features are others"):
        FrozenViT(visual)


def test_a_run_with_it_is_the_same_up_to_rounding(tmp_path, capsys, monkeypatch):
    """Training, evaluation and what is reported; which one computed a run may change, as the text tower's backend may."""
    encoded = []
    encode = FrozenViT._encode
    monkeypatch.setattr(
        FrozenViT, "_encode", lambda self, image: encoded.append(len(image)) or encode(self, image)
    )
    found = {}
    for backend in ("torch", "cpu"):
        call = ["train", "--shots", "2", "--epochs", "1", "--device", "cpu", "model.image_backend", backend]
        assert run([*call, "-q", "--json", "-o", str(tmp_path / backend)]) == 0
        found[backend] = json.loads(capsys.readouterr().out)
        assert bool(encoded) == (backend == "cpu")
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / one / "metrics.jsonl").read_text().splitlines()
            if "loss" in line
        ]
        for one in found
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) > 5
    assert found["torch"]["rows"][0]["h"] == pytest.approx(found["cpu"]["rows"][0]["h"], abs=0.3)


def test_a_run_says_where_it_cannot_be_used(tmp_path, capsys):
    call = [
        "train",
        "--shots",
        "1",
        "model.image_backend",
        "cpu",
        "--precision",
        "bf16",
        "-q",
        "-o",
        str(tmp_path / "x"),
    ]
    assert run(call) == 2
    assert "model.image_backend" in capsys.readouterr().err


def test_models_on_one_clip_share_it():
    """It is packed and compared once, however many rows a table has."""
    shared, config = Shared(), from_mapping({"model": {"image_backend": "cpu", "device": "cpu"}})
    one, other = (shared.model(config, [f"digit {name}", "letter a"]) for name in ("one", "two"))
    assert isinstance(one.image_encoder, FrozenViT)
    assert one.image_encoder is other.image_encoder
