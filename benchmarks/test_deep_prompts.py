"""Deep prompts in the tree: against the dense text tower under autograd, and against the same tree without them.

Nine layers of twelve read a prompt of their own, as in MaPLe and PromptSRC: there one context serves all images of a batch;
here also one of each image, as CoCoOp would have it. Processor time, which other programs on the machine hardly touch.
"""

import time
from functools import partial

import pytest
import torch

from cocoop_fast import TreeTextEncoder, reference
from cocoop_fast.measure.timing import interleave, seconds_of

DEPTH, LEAST_GAIN, MOST_PRICE = 9, 5.0, 1.2


@pytest.mark.parametrize("images", [1, 4])
def test_deep_prompts(benchmark, problem_of, images):
    problem = problem_of(100, images)
    encoder = TreeTextEncoder(problem.clip_model, problem.tree)
    tokens, m = problem.tokens, problem.tree.n_ctx
    generator = torch.Generator().manual_seed(0)
    ctx, *deep = (
        torch.randn(images, m, 512, generator=generator).mul(0.02).requires_grad_() for _ in range(DEPTH)
    )
    probe = torch.randn(images, len(tokens), 512, generator=generator)
    places = torch.arange(1, 1 + m).expand(len(tokens), -1)
    embedding = problem.clip_model.token_embedding(tokens)
    found = {}

    def tree(deep):
        rows = [ctx, *deep]
        found[len(deep)] = torch.autograd.grad((encoder(ctx, deep) * probe).sum(), rows)

    def dense():
        """One image after the other: together they would need four times the memory."""
        parts = []
        for image in range(images):
            rows = [one[image].detach().requires_grad_() for one in (ctx, *deep)]
            first, *others = (one.expand(len(tokens), -1, -1) for one in rows)
            prompts = torch.cat([embedding[:, :1], first, embedding[:, 1 + m :]], dim=1)
            features = reference.encode_prompts(problem.clip_model, prompts, tokens, others, places)
            parts.append(torch.autograd.grad((features * probe[image]).sum(), rows))
        found["dense"] = [torch.stack(same) for same in zip(*parts, strict=True)]

    runs = {"deep": partial(tree, deep), "plain": partial(tree, [])}
    benchmark.group = f"deep prompts, {images} contexts"
    benchmark.pedantic(runs["deep"], rounds=3, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    runs["plain"]()  # its first-time costs do not matter
    dense_seconds = seconds_of(dense, time.process_time)
    for mine, expected in zip(found[len(deep)], found["dense"], strict=True):
        assert (mine - expected).abs().max() <= 2e-5 * expected.abs().max()
    times = interleave(runs, rounds=9, max_seconds=300, clock=time.process_time)
    gain, price = dense_seconds / times["deep"].median, times["deep"].median / times["plain"].median
    benchmark.extra_info |= {
        "images": images,
        "rows": problem.tree.rows,
        "dense_seconds": dense_seconds,
        "deep_seconds": times["deep"].median,
        "plain_seconds": times["plain"].median,
        "gain": gain,
        "price": price,
    }
    print(
        f"\nimages {images}: dense {dense_seconds:.2f} s, deep {times['deep'].median:.3f} s, plain "
        f"{times['plain'].median:.3f} s of processor time: {gain:.1f} x, {price:.3f} x"
    )
    assert gain >= LEAST_GAIN and price <= MOST_PRICE
