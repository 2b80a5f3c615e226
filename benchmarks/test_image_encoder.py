"""The frozen image encoder by the C++ kernels against the model's own, an image at a time and in batches."""

from __future__ import annotations

import gc
import time
from typing import Any

import open_clip
import pytest
import torch

from cocoop_fast.engine.image_tower import FrozenViT

ROUNDS = 7


@pytest.fixture(scope="module", params=["ViT-B-32", "ViT-B-16"])
def towers(request: pytest.FixtureRequest) -> Any:
    gc.collect()
    visual: Any = open_clip.create_model(request.param).visual
    visual.eval().requires_grad_(False)
    return request.param, visual, FrozenViT(visual)


@pytest.mark.parametrize("batch", [1, 8])
def test_image_encoder(benchmark, towers, batch):
    name, visual, fast = towers
    image = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = visual(image)
        off = float((fast(image) - expected).abs().max() / expected.abs().max())
    assert off < 2e-5
    torch_seconds: list[float] = []

    @torch.inference_mode()
    def by_torch() -> None:
        start = time.perf_counter()
        visual(image)
        torch_seconds.append(time.perf_counter() - start)

    benchmark.group = f"image encoder, {name}, batch {batch}"
    benchmark.pedantic(
        torch.inference_mode()(fast), args=(image,), setup=by_torch, rounds=ROUNDS, warmup_rounds=1
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    best = benchmark.stats.stats.min
    benchmark.extra_info |= {
        "model": name,
        "batch": batch,
        "milliseconds_per_image": 1e3 * best / batch,
        "milliseconds_per_image_of_torch": 1e3 * min(torch_seconds) / batch,
        "faster": min(torch_seconds) / best,
        "medians_faster": sorted(torch_seconds)[len(torch_seconds) // 2] / benchmark.stats.stats.median,
        "off": off,
    }
