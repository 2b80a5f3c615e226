"""FrozenCLIP: reads every layout, refuses what is not CLIP's text tower, notices changed weights."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from tiny_models import tiny_clip, tiny_openai_clip

from cocoop_fast import UserError
from cocoop_fast.clip.frozen import FrozenCLIP


@pytest.mark.parametrize("model", [tiny_clip(), tiny_clip(resnet=True, quick_gelu=False), tiny_openai_clip()])
def test_sizes_and_roles(model):
    frozen = FrozenCLIP(model)
    weights = frozen.text_weights()
    assert (frozen.width, frozen.heads, frozen.layers, frozen.embed_dim) == (48, 3, 3, 64)
    assert (frozen.context_length, frozen.vocab_size, frozen.image_size) == (77, 49408, 32)
    assert weights.blocks[1].in_proj.weight.shape == (144, 48)
    assert weights.blocks[2].fc.weight.data_ptr() == model.transformer.resblocks[2].mlp.c_fc.weight.data_ptr()
    assert not weights.projection.weight.requires_grad


def test_activation_is_read():
    assert FrozenCLIP(tiny_clip(quick_gelu=True)).activation == "quick_gelu"
    assert FrozenCLIP(tiny_clip(quick_gelu=False)).activation == "gelu"


def test_snapshot_is_kept_until_a_weight_changes():
    model = tiny_clip()
    frozen = FrozenCLIP(model)
    before = frozen.text_weights()
    assert frozen.text_weights() is before
    with torch.no_grad():
        model.transformer.resblocks[0].mlp.c_fc.bias.add_(1)
    after = frozen.text_weights()
    assert after is not before
    model.double()
    assert frozen.text_weights().dtype == torch.float64


def test_what_a_fork_keeps_in_a_block_is_no_weight_of_the_tower():
    """A deep prompt changes at every step, and constants and packed copies would be made anew each time."""
    model = tiny_openai_clip()
    block = model.transformer.resblocks[1]
    block.prompt = torch.nn.Parameter(torch.zeros(2, 48))
    frozen = FrozenCLIP(model)
    before = frozen.text_weights()
    with torch.no_grad():
        block.prompt.add_(1)
    assert frozen.text_weights() is before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"no_causal_mask": True}, "not causal"),
        ({"pool_type": "last"}, "pools by 'last'"),
        ({"pool_type": "first"}, "pools by 'first'"),
        ({"act_kwargs": {"approximate": "tanh"}}, "activation"),
        ({"scale_attn": True, "block_type": "custom"}, "CustomResidualAttentionBlock"),
    ],
)
def test_other_text_towers_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        FrozenCLIP(tiny_clip(quick_gelu=False, **text))


def test_a_model_without_text_tower_is_refused():
    with pytest.raises(UserError, match="no `token_embedding`"):
        FrozenCLIP(torch.nn.Linear(2, 2))


def test_siglip_is_refused():
    model = open_clip.model.CustomTextCLIP(
        64,
        open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32),
        open_clip.CLIPTextCfg(width=32, heads=2, layers=1, no_causal_mask=True, pool_type="last"),
    )
    with pytest.raises(UserError, match="pools by 'last'"):
        FrozenCLIP(model)


def test_every_architecture_of_open_clip_is_read_or_refused_with_a_sentence():
    """All text towers that open_clip builds itself, with one layer and few words."""
    vision = {"layers": 1, "width": 16, "head_width": 16, "patch_size": 16, "image_size": 32}
    verdicts: dict[str, bool] = {}
    read: dict[str, bool] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text = {**config["text_cfg"], "layers": 1, "vocab_size": 100}
        if "hf_model_name" in text:
            continue
        names = ("hf_tokenizer_name", "tokenizer_kwargs")  # not the tower's
        text = {key: value for key, value in text.items() if key not in names}
        custom, quick_gelu = config.get("custom_text", False), config.get("quick_gelu", False)
        key = json.dumps([text, custom, quick_gelu], sort_keys=True)
        if key not in verdicts:
            kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
            model = kind(config["embed_dim"], dict(vision), text, quick_gelu=quick_gelu)
            try:
                verdicts[key] = FrozenCLIP(model).width == text["width"]
            except UserError:
                verdicts[key] = False
        read[name] = verdicts[key]
    vits = ("B-32", "B-16", "L-14", "L-14-336", "H-14", "g-14", "bigG-14")
    for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", *(f"ViT-{size}" for size in vits)):
        assert read[name], name
        assert read.get(f"{name}-quickgelu", True), name
    for name in read:
        if "SigLIP" in name or "CLIPA" in name or name.startswith("coca"):
            assert not read[name], name
