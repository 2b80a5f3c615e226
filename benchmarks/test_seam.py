"""A fork's text features by its own dense text encoder, and at the seam: forward and backward, in processor time.

Prompts of each form that forks have, of K = 50 names; what depends on an image is of one image.
"""

import time

import pytest
import torch
from torch import nn

from cocoop_fast import reference
from cocoop_fast.integrations.text_seam import accelerate
from cocoop_fast.measure.timing import interleave

M, D = 4, 512


class TextEncoder(nn.Module):
    """As forks have it, for a CLIP of open_clip; with the deep prompts of MaPLe, (M, d) each."""

    def __init__(self, clip_model):
        super().__init__()
        self.clip_model = clip_model

    def forward(self, prompts, tokens, deep=()):
        rows = [one.expand(len(tokens), -1, -1) for one in deep]
        places = torch.arange(1, 1 + M).expand(len(tokens), -1)
        return reference.encode_prompts(self.clip_model, prompts, tokens, rows, places)


class Model(nn.Module):
    def __init__(self, clip_model):
        super().__init__()
        self.text_encoder = TextEncoder(clip_model)


@pytest.mark.parametrize("form", ["shared", "of each class", "amid", "deep"])
def test_seam(benchmark, problem_of, form):
    problem = problem_of(50, 1)
    clip_model, tokens = problem.clip_model, problem.tokens
    generator = torch.Generator().manual_seed(0)
    shape = (len(tokens), M, D) if form == "of each class" else (M, D)
    learned = [
        (0.02 * torch.randn(shape, generator=generator)).requires_grad_()
        for _ in range(9 if form == "deep" else 1)
    ]
    embedding = clip_model.token_embedding(tokens)
    probe = torch.randn(len(tokens), D, generator=generator)
    lengths, position = (problem.lengths - M - 3).tolist(), "middle" if form == "amid" else "end"
    models = {"own": Model(clip_model), "seam": Model(clip_model)}
    said, found = [], {}
    accelerate(models["seam"], clip_model, said.append)

    def step(name):
        ctx, *deep = learned
        prompts = reference.place_contexts(embedding, ctx.expand(len(tokens), -1, -1), lengths, position)
        features = models[name].text_encoder(prompts, tokens, *([deep] if deep else []))
        found[name] = torch.autograd.grad((features * probe).sum(), learned)

    benchmark.group = f"at the seam, context {form}"
    benchmark.pedantic(step, args=("seam",), rounds=3, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    actions = {name: lambda name=name: step(name) for name in models}
    times = interleave(actions, rounds=3, max_seconds=60, clock=time.process_time)
    for mine, expected in zip(found["seam"], found["own"], strict=True):
        assert (mine - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert not said
    own, seam = (times[name].median for name in ("own", "seam"))
    benchmark.extra_info |= {"form": form, "own_seconds": own, "seam_seconds": seam, "gain": own / seam}
    print(f"\n{form}: own {own:.2f} s, at the seam {seam:.2f} s of processor time: {own / seam:.1f} x")
    assert seam < own
