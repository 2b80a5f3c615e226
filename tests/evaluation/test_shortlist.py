"""Evaluation by shortlists: with all classes it is the exact one, and what is said of its error is true."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from comparison import assert_close
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import CustomCLIP, UserError
from cocoop_fast.distributed.ranks import Group, Ranks
from cocoop_fast.engine.pieces import Pieces, shard
from cocoop_fast.evaluation import shortlist
from cocoop_fast.evaluation.evaluate import Features, evaluate
from cocoop_fast.evaluation.metrics import Comparison
from cocoop_fast.evaluation.shortlist import ShortlistClassifier, evaluate_by_shortlist, sample_size
from cocoop_fast.methods import CoOp, MetaNetsCLIP, ZeroShot
from cocoop_fast.methods.cocoop import reference_cfg

NAMES = [f"{size} thing {i}" for i in range(10) for size in ("small", "large")] + ["small thing 3"]
K, E = len(NAMES), 64


def model_of(method=CustomCLIP, *, csc=False, **engine):
    """A model whose contexts the images change a good deal."""
    words = "" if csc else "a photo of a"
    cfg = reference_cfg(ctx_init=words, n_ctx=4, precision="fp32", image_size=IMAGE_SIZE, csc=csc)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="cannot be told apart"):
        model = method(cfg, NAMES, tiny_clip(layers=2), **engine)
    with torch.no_grad():
        for name, parameter in model.prompt_learner.named_parameters():
            if "linear2" in name:
                parameter.mul_(20)
    return model.eval()


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, E, generator=generator)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("method", [CustomCLIP, MetaNetsCLIP])
def test_a_shortlist_of_all_classes_is_the_exact_evaluation(method, backend):
    model, x = model_of(method, backend=backend), images(5)
    with torch.no_grad():
        expected = model.forward_features(x)
    for n in (K, K + 9):
        assert_close(ShortlistClassifier(model, n).forward_features(x), expected, 1e-5, "logits")


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("in_shards", [False, True])
def test_each_image_chooses_among_its_own_likeliest_classes(backend, in_shards, monkeypatch):
    model, x = model_of(backend=backend), images(6)
    with torch.no_grad():
        exact = model.forward_features(x)
        alone = model.tree_encoder(model.prompt_learner.ctx)
        likely = torch.nn.functional.cosine_similarity(x[:, None], alone[None], dim=2).topk(7, dim=1).indices
    if in_shards:  # as where not even one image fits the memory
        decide = lambda tower, batch, keeps: Pieces(1, shard(tower.constants.tree, 4))  # noqa: E731
        monkeypatch.setattr(model.tree_encoder.memory, "_decide", decide)
        model.tree_encoder.memory._known.clear()
    logits = ShortlistClassifier(model, 7).forward_features(x)
    for got, all_classes, own in zip(logits, exact, likely, strict=True):
        assert set(got.isfinite().nonzero()[:, 0].tolist()) == set(own.tolist())
        assert_close(got[own], all_classes[own], 1e-5, "logits")
    assert len({tuple(sorted(own)) for own in likely.tolist()}) > 1, "all images have the same shortlist"


def test_the_comparison_is_true():
    model, n = model_of(), 3
    x = images(80)
    with torch.no_grad():
        by_all = model.forward_features(x).argmax(dim=1)
        by_list = ShortlistClassifier(model, n).forward_features(x).argmax(dim=1)
    right, wrong = by_all != by_list, by_all == by_list
    assert 5 < right.sum() < 75, "this model cannot tell a true comparison from a false one"
    labels = torch.where(torch.arange(80) % 3 == 0, by_list, by_all)
    seen = []
    metrics = evaluate_by_shortlist(
        ShortlistClassifier(model, n),
        Features(x, labels),
        seed=4,
        batch_size=32,
        progress=lambda *done: seen.append(done),
    )
    found = metrics.shortlist
    assert metrics.correct == int((by_list == labels).sum()) == found.correct
    assert found.correct_of_all == int((by_all == labels).sum())
    assert (found.classes, found.images, found.seed) == (n, 80, 4)
    assert found.agreeing == int(wrong.sum()) and found.agreement == 100 * found.agreeing / 80
    assert found.gained == int(((by_list == labels) & (by_all != labels)).sum()) > 0
    assert found.difference == pytest.approx(100 * (found.correct - found.correct_of_all) / 80)
    assert metrics.summary()["shortlist"]["agreement"] == found.agreement
    assert seen == sorted(seen) and seen[-1] == (80, 80)
    exact = evaluate(model, Features(x, labels), K)
    assert exact.shortlist is None and "shortlist" not in exact.summary()
    assert exact.correct == found.correct_of_all


def test_the_sample_is_drawn_by_the_seed(monkeypatch):
    monkeypatch.setattr(shortlist, "LEAST_SAMPLE", 10)
    model, x = model_of(), images(60)
    features, drawn = Features(x, torch.zeros(60, dtype=torch.int64)), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda rows: drawn.append(rows) or logits(rows))
    for seed in (1, 1, 2):
        found = evaluate_by_shortlist(ShortlistClassifier(model, 2), features, seed=seed).shortlist
        assert found.images == 10
    places = [[(x == row).all(dim=1).nonzero().item() for row in rows] for rows in drawn]
    assert places[0] == places[1] != places[2]
    assert len(set(places[0])) == 10 and sorted(places[0]) != list(range(10))


def test_the_sample_costs_a_part_of_the_rest():
    assert sample_size(50_000, 50, 1000) == 625
    assert sample_size(50_000, 500, 1000) == 1000
    assert sample_size(2_000, 50, 1000) == 100
    assert sample_size(70, 50, 1000) == 70
    for images_in_all in (10_000, 50_000, 80_000):
        assert 1000 * sample_size(images_in_all, 50, 1000) <= max(0.25 * 50 * images_in_all, 100_000)


def test_the_interval_holds_what_it_says():
    """Of outcomes drawn at random: 95 % of the intervals have the true difference in them, and those that differ little."""
    generator = np.random.default_rng(0)
    for both, gained, lost in [(0.6, 0.02, 0.05), (0.7, 0.0, 0.004), (0.3, 0.2, 0.1)]:
        true, inside = 100 * (gained - lost), 0
        for _ in range(1000):
            a, b, c, d = generator.multinomial(400, [both, gained, lost, 1 - both - gained - lost])
            low, high = Comparison(5, 400, 0, a + d, a + b, a + c, b).interval
            inside += low <= true <= high
        assert 930 <= inside <= 1000
    low, high = Comparison(5, 100, 0, 100, 70, 70, 0).interval
    assert high == -low and 1.5 < high < 2.5  # nothing seen in a hundred images is not nothing
    worse = Comparison(5, 100, 0, 80, 55, 70, 0)
    assert worse.difference == -15 and worse.interval[1] < -5


@dataclass(frozen=True)
class Pair(Group):
    """Two ranks that are threads."""

    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))
    said: dict = field(default_factory=dict)

    def gather_objects(self, value):
        self.said[self.index] = value
        self.meeting.wait()
        values = [self.said[0], self.said[1]]
        self.meeting.wait()
        return values


def test_ranks_share_images_and_sample(monkeypatch):
    monkeypatch.setattr(shortlist, "LEAST_SAMPLE", 9)
    model, x = model_of(backend="torch"), images(31)
    labels = torch.arange(31) % K
    both = Pair(0, 2)

    def rank(index):
        group = Pair(index, 2, meeting=both.meeting, said=both.said)
        own = slice(0, 15) if index == 0 else slice(15, 31)
        features = Features(x[own], labels[own])
        return evaluate_by_shortlist(
            ShortlistClassifier(model, 4), features, seed=0, ranks=Ranks(everyone=group)
        )

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(rank, range(2))
    assert first == second
    assert first.total == 31 and first.shortlist.images == 9
    alone = evaluate_by_shortlist(ShortlistClassifier(model, 4), Features(x, labels), seed=0)
    assert first.confusion == alone.confusion


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: model_of(CoOp), "encoded once for all images"),
        (lambda: model_of(csc=True), "here each has its own"),
        (lambda: ZeroShot("a {}.", ["dog", "cat"], tiny_clip()), "encoded once for all images"),
    ],
)
def test_where_a_shortlist_makes_no_sense(make, words):
    with pytest.raises(UserError, match=words):
        ShortlistClassifier(make(), 3)


def test_a_shortlist_of_nothing():
    with pytest.raises(UserError, match="at least one class, but 0"):
        ShortlistClassifier(model_of(), 0)
