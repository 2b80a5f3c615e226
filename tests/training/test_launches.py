"""How many launches a training step makes beside the layers of the tower; docs/kernels.md has the numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from comparison import assert_close
from tiny_models import IMAGE_SIZE, tiny_clip
from tiny_training import recipe

from cocoop_fast import CustomCLIP
from cocoop_fast.engine.contexts import ContextRows
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.training.optimizer import build_optimizer
from cocoop_fast.training.precision import LossScaler
from cocoop_fast.training.step import loss_and_gradients

pytest.importorskip("triton.runtime.interpreter")

from launches import Launches

TEMPLATE = Path(__file__).parents[2] / "tools" / "make_kernels_page.py"


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter")


def tiny_model(backend, dtype=torch.float32):
    torch.manual_seed(0)
    cfg = reference_cfg(ctx_init="", n_ctx=2, precision="fp32", image_size=IMAGE_SIZE)
    clip = tiny_clip(dtype=dtype, layers=2, width=32, heads=2, embed_dim=32)
    clip.logit_scale.data = clip.logit_scale.data.float()  # as a CLIP in half precision is loaded
    return CustomCLIP(cfg, ["cat", "dog"], clip, backend=backend)


@pytest.mark.parametrize(
    "scaled, dtype", [(False, torch.float32), (True, torch.float16)], ids=["fp32", "fp16"]
)
def test_launches_beside_the_tower(monkeypatch, scaled, dtype):
    """From image features to the parameters of the next step; on a CPU torch's operations stand for their launches."""
    model = tiny_model("triton", dtype)
    monkeypatch.setattr(model, "check", lambda *_: None)  # on a GPU no value is looked at
    parameters = list(model.prompt_learner.parameters())
    scaler = LossScaler(torch.device("cpu"), enabled=scaled)
    optimizer = build_optimizer(parameters, recipe(), fused=True)
    step = loss_and_gradients(model, parameters, "fp32", scaler)
    features, label = torch.randn(2, 32).to(dtype), torch.tensor([0, 1])

    def update():
        result = step(features, label)
        for parameter, gradient in zip(parameters, result.gradients, strict=True):
            parameter.grad = gradient
        scaler.step(optimizer, result.overflow)

    def counted(work):
        with monkeypatch.context() as patched, Launches(patched, run=False) as launches:
            work()
        return launches.count()

    update()  # lays the memory out
    whole = counted(update)
    contexts = ContextRows(torch.randn(2, 32).requires_grad_(), torch.randn(2, 32).requires_grad_())
    gradient = torch.ones(2, 2, 32, dtype=dtype)
    tower = counted(lambda: model.tree_encoder.tower.encode(contexts).backward(gradient))
    beside = whole - tower
    for name in ("promote_types", "_record_function_enter_new", "_record_function_exit"):  # the host's alone
        del beside[name]
    [said] = re.findall(r"(\d+) launches, and (\d+) with loss scaling", TEMPLATE.read_text())
    assert beside.total() == int(said[scaled]), dict(beside)


@pytest.mark.parametrize("bad", [False, True], ids=["", "overflow"])
def test_what_is_launched_is_the_step(bad):
    """Report and gradients are those of torch's operations; an overflow is seen."""
    results = []
    for backend in ("triton", "torch"):
        model, scaler = tiny_model(backend), LossScaler(torch.device("cpu"), enabled=True)
        if bad:
            scaler.load_state_dict({**scaler.state_dict(), "scale": math.inf})
        step = loss_and_gradients(model, list(model.prompt_learner.parameters()), "fp32", scaler)
        generator = torch.Generator().manual_seed(1)
        results.append(step(torch.randn(3, 32, generator=generator), torch.tensor([0, 1, 1])))
    ours, torchs = results
    assert ours.overflow == bad and torchs.overflow is None
    if bad:
        assert not ours.report[3].isfinite() and not torchs.report[3].isfinite()
        return
    torch.testing.assert_close(ours.report, torchs.report, rtol=1e-4, atol=0)
    for one, other in zip(ours.gradients, torchs.gradients, strict=True):
        assert_close(one, other, 1e-4)
