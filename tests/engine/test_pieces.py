"""Passes in pieces: what fits a memory budget, and the same features and gradients as in one piece."""

from __future__ import annotations

import gc

import pytest
import torch
from comparison import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import NAMES, M, encoder, tree_of

from cocoop_fast import UserError
from cocoop_fast.engine.memory import parse_bytes
from cocoop_fast.engine.pieces import ROWS_PER_INFERENCE_PASS, MemoryBudget, Pieces, shard
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.prompts.tree import ClassTree as Tree


def features_and_gradient(encoder, ctx):
    ctx = ctx.to(encoder.frozen.dtype).requires_grad_()
    features = encoder(ctx)
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features)
    (gradient,) = torch.autograd.grad((features * probe).sum(), ctx)
    return features.detach(), gradient


def context(batch):
    return 0.5 * torch.randn(batch, M, 48, generator=torch.Generator().manual_seed(0))


def in_pieces(encoder, monkeypatch, *, images, nodes):
    """Make every pass of the encoder one over so many images and nodes."""
    shards = () if nodes is None else shard(encoder.tree, nodes)
    monkeypatch.setattr(
        encoder.memory, "_decide", lambda tower, batch, keeps: Pieces(images, shards if images == 1 else ())
    )
    return max(1, len(shards))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("images", "nodes"), [(1, None), (2, None), (1, 40), (1, 7), (1, 1)])
def test_the_same_in_pieces(backend, images, nodes, monkeypatch):
    if backend == "cpu" and CPP.why_unavailable():
        pytest.skip("the C++ extension is not built")
    dtype, tolerance = (torch.float64, 1e-13) if backend == "torch" else (torch.float32, 1e-6)
    whole, parted = encoder(dtype, backend), encoder(dtype, backend)
    pieces = in_pieces(parted, monkeypatch, images=images, nodes=nodes)
    assert nodes is None or pieces >= min(60, len(parted.tree) // nodes)
    expected_features, expected_gradient = features_and_gradient(whole, context(3))
    features, gradient = features_and_gradient(parted, context(3))
    assert_close(features, expected_features, tolerance, "features")
    assert_close(gradient, expected_gradient, tolerance, "gradient")
    with torch.no_grad():
        assert_close(parted(context(3).to(dtype)), expected_features, tolerance, "without gradients")


def test_the_same_bits_every_time(monkeypatch):
    parted = encoder()
    in_pieces(parted, monkeypatch, images=1, nodes=20)
    first = features_and_gradient(parted, context(2))
    again = features_and_gradient(parted, context(2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_deep_prompts_in_pieces(dtype, tolerance, monkeypatch):
    whole, parted = encoder(dtype), encoder(dtype)
    in_pieces(parted, monkeypatch, images=1, nodes=20)
    results = []
    for one in (whole, parted):
        rows = [context(2).to(dtype).mul(scale).requires_grad_() for scale in (1.0, 0.7)]
        features = one(rows[0], rows[1:])
        results.append([features, *torch.autograd.grad(features.square().sum(), rows)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, tolerance)


paths = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=30)


@settings(max_examples=60)
@given(names=paths, nodes=st.integers(1, 40))
def test_shards_cover_the_tree(names, nodes):
    tree = tree_of(names)
    shards = shard(tree, nodes)
    leaves = torch.cat([tree.leaves[part.leaves] for part in shards])
    assert leaves.equal(tree.leaves)
    assert sorted(k for part in shards for k in classes_of(part.tree)) == sorted(classes_of(tree))
    for part in shards:
        alone = len(part.tree.leaves) == 1
        assert alone or len(part.tree) <= nodes
        assert list(classes_of(part.tree))


def classes_of(tree: Tree):
    """Each class's tokens, by walking up from its EOT."""
    found = []
    for node in tree.eot.tolist():
        name = []
        while node >= 0:
            name.append(int(tree.token[node]))
            node = int(tree.parent[node])
        found.append(tuple(reversed(name)))
        assert len(name) <= tree.max_depth
    return found


def test_subtree_is_a_tree():
    tree = tree_of(NAMES)
    part = tree.subtree(tree.ancestors(tree.leaves[5:9]))
    assert classes_of(part) == [name for name in classes_of(tree) if name in set(classes_of(part))]
    for node in range(len(part)):
        inside = [n for n in range(len(part)) if node in part.path[n].tolist()]
        assert inside == list(range(node, int(part.subtree_end[node])))


def test_budget_decides():
    one = encoder(memory_budget=None)
    tower = one.tower
    unlimited = MemoryBudget(10**12)
    assert unlimited.pieces(tower, 8, keeps=True) == Pieces(8)
    seen = []
    for budget in (40_000_000, 9_000_000, 6_000_000, 5_000_000, 4_500_000):
        pieces = MemoryBudget(budget).pieces(tower, 64, keeps=True)
        assert not pieces.shards or pieces.images == 1, "classes are parted after images"
        seen.append((pieces.images, -len(pieces.shards)))
    assert seen == sorted(seen, reverse=True)
    assert seen[0][0] > 1
    assert seen[-1][1] < -1
    with pytest.raises(UserError, match=r"budget of 1 MB is too small.* needs [\d.]+ MB at least") as refused:
        MemoryBudget("1MB").pieces(tower, 64, keeps=True)
    needed = str(refused.value).split("needs ")[1].split(" MB")[0]
    assert MemoryBudget(f"{needed}MB").pieces(tower, 64, keeps=True).shards


def test_budget_is_obeyed_by_the_encoder():
    """The first budget streams, and a lower one after running out of memory streams in more pieces."""
    whole, small = encoder(), encoder(memory_budget="5MB")
    for actual, expected in zip(
        features_and_gradient(small, context(64)), features_and_gradient(whole, context(64)), strict=True
    ):
        assert_close(actual, expected, 1e-6)
    tower = small.tower
    before = small.memory.pieces(tower, 64, keeps=True)
    assert before.images < 64
    small.memory.lower(tower, 64)
    after = small.memory.pieces(tower, 64, keeps=True)
    assert (after.images, -len(after.shards)) < (before.images, -len(before.shards))


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MB", 256_000_000), ("1.5 GiB", 3 * 2**29), ("4gb", 4 * 10**9), (12345, 12345), ("512", 512)],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3MB", "0", 0, -1, True, "5 bananas", "1e9"])
def test_bad_budgets(text):
    with pytest.raises(UserError, match="is not an amount of memory; give bytes, or say 256MB"):
        parse_bytes(text)


@pytest.mark.parametrize("classes", [[0], [3, 7, 8, 40], [20, 61], list(range(62))])
def test_encode_classes(classes):
    one = encoder(torch.float64, "torch")
    wanted = torch.tensor(classes)
    ctx = context(2).double().requires_grad_()
    full, some = one(ctx)[:, wanted], one.encode_classes(ctx, wanted)
    assert_close(some, full, 1e-13)
    probe = torch.randn_like(full)
    (expected,) = torch.autograd.grad((full * probe).sum(), ctx)
    (gradient,) = torch.autograd.grad((some * probe).sum(), ctx)
    assert_close(gradient, expected, 1e-12)


def test_memory_is_not_asked_about_for_every_part_of_a_tree_that_fits(monkeypatch):
    """Pruning makes a part at every step. Where the whole does not fit, each is looked at."""
    one, asked = encoder(backend="torch", memory_budget="1GB"), []
    kind = type(one.tower)
    size = kind.pass_size
    noted = lambda self, trees, *sizes, **how: asked.append(trees) or size(self, trees, *sizes, **how)  # noqa: E731
    monkeypatch.setattr(kind, "pass_size", noted)
    ctx = context(2).requires_grad_()
    for first in range(3):
        one.encode_classes(ctx, torch.arange(first, 20)).sum().backward()
    assert asked == [[one.tree]]
    one.memory.bytes, whole = 10**5, one.encode_classes(ctx, torch.arange(2, 20))
    one.lower_memory(2)
    asked.clear()
    assert_close(one.encode_classes(ctx, torch.arange(2, 20)), whole, 1e-6)
    assert any(tree is not one.tree for trees in asked for tree in trees)


def test_a_part_of_all_classes_is_the_whole():
    one = encoder(backend="torch")
    assert one.part(torch.arange(62).flip(0))._tower is one.tower
    assert one.part(torch.arange(61))._tower is one.tower  # the last one has the prompt of another
    assert one.part(torch.arange(59))._tower is not one.tower


@pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the engine's buffers")
def test_lowering_the_budget_gives_the_memory_of_larger_pieces_back():
    one = encoder()
    features_and_gradient(one, context(4))
    assert one.tower.pooled_bytes > 0
    expected = features_and_gradient(one, context(4))
    one.lower_memory(4)
    assert one.tower.pooled_bytes == 0
    for mine, other in zip(features_and_gradient(one, context(4)), expected, strict=True):
        assert_close(mine, other, 1e-6)


def test_pieces_are_computed_again_under_the_autocast_of_the_first_pass(monkeypatch):
    one, dtypes = encoder(backend="torch"), []
    in_pieces(one, monkeypatch, images=1, nodes=20)
    kind = type(one.tower)
    encode = kind.encode

    def noted(self, *rows):
        features = encode(self, *rows)
        dtypes.append(features.dtype)
        return features

    monkeypatch.setattr(kind, "encode", noted)
    ctx = context(1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        features = one(ctx)
    features.float().sum().backward()
    assert len(dtypes) > 3 and set(dtypes) == {torch.bfloat16}


@pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not there")
def test_a_shard_is_planned_once_and_not_at_each_of_its_passes(monkeypatch):
    engine = encoder(backend="cpu")
    parts = Pieces(1, shard(engine.tree, 40))
    assert len(parts.shards) > 1
    monkeypatch.setattr(MemoryBudget, "pieces", lambda *_, **__: parts)
    ops, planned = engine.tower.ops, []
    plan = ops.tree_attention
    monkeypatch.setattr(ops, "tree_attention", lambda *a: planned.append(len(a)) or plan(*a))
    for _ in range(3):
        features_and_gradient(engine, context(2))
    assert len(planned) == 2 * len(parts.shards)  # of all rows, and of the leaves
    alive = len(engine.tower.shared._attentions)
    parts = Pieces(2)
    gc.collect()
    assert len(engine.tower.shared._attentions) < alive  # gone with the shards


def test_a_gpu_takes_more_rows_in_a_pass_that_keeps_nothing():
    """Its host launches each pass anew."""
    assert ROWS_PER_INFERENCE_PASS["cuda"] >= 4 * ROWS_PER_INFERENCE_PASS["cpu"]
