"""What beginners pass to a model: each works, or is refused with a sentence that says what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comparison import assert_close
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import CustomCLIP, UserError
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.methods import CoOp, LinearProbe, ZeroShot
from cocoop_fast.methods.cocoop import reference_cfg

NAMES = ["cat", "dog", "red fox"]
IMAGE = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
LABEL = torch.tensor([0, 2])


def cfg():
    return reference_cfg(ctx_init="a photo of a", n_ctx=4, precision="fp32", image_size=IMAGE_SIZE)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ((IMAGE * 255).to(torch.uint8), r"torch.uint8 of \(2, 3, 32, 32\); divide bytes by 255"),
        (IMAGE.permute(0, 2, 3, 1), r"put the channels first, image.permute\(0, 3, 1, 2\)"),
        (IMAGE[0], r"got torch.float32 of \(3, 32, 32\); add the batch, image\[None\]"),
        (torch.rand(2, 3, 48, 48), r"must be a floating-point \(B, 3, 32, 32\) tensor.*preprocess"),
        (IMAGE[:, :1], "preprocess images as this CLIP expects"),
        (IMAGE[:0], "preprocess images as this CLIP expects"),
        (IMAGE.numpy(), "got a ndarray; make it a tensor"),
    ],
)
def test_images(image, message):
    for model in (CustomCLIP(cfg(), NAMES, tiny_clip()), ZeroShot("a {}.", NAMES, tiny_clip()).eval()):
        with pytest.raises(UserError, match=message):
            model(image, LABEL[: len(image)])


@pytest.mark.parametrize("kind", [CustomCLIP, LinearProbe])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_labels(kind, backend):
    if kind is LinearProbe:
        model = LinearProbe(NAMES, tiny_clip())
    else:
        model = kind(cfg(), NAMES, tiny_clip(), backend=backend)
    expected = model(IMAGE, LABEL)
    for label in ([0, 2], (0, 2), LABEL.int(), LABEL.numpy(), LABEL.numpy().astype(np.uint8)):
        assert torch.equal(model(IMAGE, label), expected)
    for label in (["cat", "dog"], [0.0, 2.0], 0, torch.eye(3)[:2], LABEL.bool()):
        with pytest.raises(UserError, match=r"`label` must be .*integers"):
            model(IMAGE, label)


def test_features_that_are_no_tensor():
    model = CustomCLIP(cfg(), NAMES, tiny_clip()).eval()
    with pytest.raises(UserError, match="`image_features` must be a"):
        model.forward_features([[0.0] * 64])
    with pytest.raises(UserError, match="`image_features` must be a"):
        model.forward_features(np.ones((2, 64), dtype=np.float32))


def test_a_cfg_of_dicts():
    options = {"N_CTX": 4, "CTX_INIT": "a photo of a", "PREC": "fp32"}
    model = CustomCLIP({"TRAINER": {"COCOOP": options}, "INPUT": {"SIZE": (32, 32)}}, NAMES, tiny_clip())
    assert torch.equal(model.prompt_learner.ctx, CustomCLIP(cfg(), NAMES, tiny_clip()).prompt_learner.ctx)
    CustomCLIP({"TRAINER": {"COCOOP": options}, "INPUT": {"SIZE": 32}}, NAMES, tiny_clip())
    for wrong, lacking in (
        (None, "TRAINER.COCOOP.CTX_INIT"),
        ({"TRAINER": {"COCOOP": options}}, "INPUT.SIZE"),
        ({"TRAINER": {"COOP": options}, "INPUT": {"SIZE": 32}}, "TRAINER.COCOOP.CTX_INIT"),
    ):
        with pytest.raises(UserError, match=rf"has no {lacking}; give the reference's cfg"):
            CustomCLIP(wrong, NAMES, tiny_clip())


def test_class_names_in_a_dict_are_refused():
    with pytest.raises(UserError, match="must be a non-empty list of names"):
        CustomCLIP(cfg(), {0: "cat", 1: "dog"}, tiny_clip())


@pytest.mark.parametrize("kind", [CustomCLIP, CoOp])
@pytest.mark.parametrize("used", [False, True])
def test_double_after_construction_is_that_of_a_double_model(kind, used):
    model, wanted = kind(cfg(), NAMES, tiny_clip()), kind(cfg(), NAMES, tiny_clip(dtype=torch.float64))
    if used:
        model(IMAGE, LABEL)
    model.double()
    parameters = model.prompt_learner.state_dict()
    wanted.prompt_learner.load_state_dict(parameters)
    assert model.dtype == torch.float64
    losses = [one(IMAGE, LABEL) for one in (model, wanted)]
    gradients = [
        torch.autograd.grad(loss, one.prompt_learner.ctx)[0]
        for loss, one in zip(losses, (model, wanted), strict=True)
    ]
    assert losses[0].dtype == torch.float64
    assert_close(losses[0], losses[1], 1e-12)
    assert_close(gradients[0], gradients[1], 1e-10)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_every_model_can_be_cast(cast):
    clip = tiny_clip()
    for model in (
        CustomCLIP(cfg(), NAMES, clip),
        CoOp(cfg(), NAMES, tiny_clip()),
        ZeroShot("a {}.", NAMES, tiny_clip()),
        LinearProbe(NAMES, tiny_clip()),
    ):
        exact = model.eval()(IMAGE).float()
        logits = getattr(model, cast)()(IMAGE)
        assert logits.dtype == model.dtype != torch.float32
        assert_close(logits.float(), exact, 0.05)


def test_a_cast_beyond_a_named_backend_is_refused():
    with pytest.raises(UserError, match=r"'cpu' cannot be used here: it does not compute in torch.float64"):
        CustomCLIP(cfg(), NAMES, tiny_clip(), backend="cpu").double()(IMAGE, LABEL)


def test_predictor_of_text():
    with pytest.raises(UserError, match="nowhere is not a run directory"):
        Predictor.from_run("nowhere")
    with pytest.raises(UserError, match="is a single image; give a list"):
        Predictor.__new__(Predictor).predict("photo.jpg")
