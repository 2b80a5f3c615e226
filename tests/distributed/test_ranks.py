"""The grid of ranks, what each of them has of images and classes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import make_batches

from cocoop_fast import ClassTree, UserError
from cocoop_fast.cli import run
from cocoop_fast.distributed import launch
from cocoop_fast.distributed.class_shards import balanced_shares
from cocoop_fast.distributed.ranks import ALONE, Group, Ranks, grid


@pytest.mark.parametrize(
    ("ranks", "shard", "batch_size", "expected"),
    [
        (1, "both", 1, (1, 1)),
        (2, "auto", 1, (1, 2)),
        (2, "auto", 4, (2, 1)),
        (3, "classes", 8, (1, 3)),
        (4, "both", 2, (2, 2)),
        (8, "both", 4, (4, 2)),
        (12, "both", 6, (6, 2)),
        (6, "both", 3, (3, 2)),
    ],
)
def test_grid(ranks, shard, batch_size, expected):
    assert grid(ranks, shard, batch_size) == expected


@pytest.mark.parametrize(
    ("ranks", "shard", "batch_size", "sentence"),
    [
        (3, "images", 4, "A batch of 4 cannot be shared evenly by 3 ranks"),
        (2, "images", 1, "A batch of 1 cannot be shared evenly by 2 ranks"),
        (3, "both", 3, "3 ranks and a batch of 3 cannot be parted by images and classes both"),
        (4, "both", 1, "4 ranks and a batch of 1 cannot be parted"),
    ],
)
def test_grids_that_make_no_sense(ranks, shard, batch_size, sentence):
    with pytest.raises(UserError, match=sentence):
        grid(ranks, shard, batch_size)


def test_the_parts_of_a_batch_make_the_whole():
    """The same images with the same augmentation, in the same order, whatever the number of ranks."""
    whole = list(make_batches(14, 6).epoch(3, first_batch=1))
    for n in (2, 3, 6):
        parts = [list(_share(make_batches(14, 6), i, n).epoch(3, first_batch=1)) for i in range(n)]
        for number, batch in enumerate(whole):
            own = [part[number] for part in parts]
            assert all(len(one.label) == 6 // n for one in own)
            for field in batch._fields:
                assert torch.equal(torch.cat([getattr(one, field) for one in own]), getattr(batch, field))


def test_fewer_images_than_a_batch_are_shared_too():
    parts = [next(_share(make_batches(4, 32), i, 2).epoch(1)) for i in range(2)]
    assert [len(part.label) for part in parts] == [2, 2]
    assert sorted(torch.cat([part.sample for part in parts]).tolist()) == [0, 1, 2, 3]


def _share(batches, i, n):
    return replace(batches, share=(i, n))


@given(st.integers(0, 40), st.integers(1, 7))
def test_items_are_shared_out_evenly(n, size):
    items = list(range(n))
    parts = [Group(i, size).share(items) for i in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


names = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=40)


@given(names, st.data())
def test_classes_are_shared_out_by_rows(names, data):
    tree = _tree(names)
    parts = data.draw(st.integers(1, len(tree.leaves)))
    shares = balanced_shares(tree, parts)
    assert sorted(torch.cat(shares).tolist()) == list(range(len(names)))
    leaves = [set(tree.leaf_of_class[share].tolist()) for share in shares]
    assert all(leaves) and sum(map(len, leaves)) == len(tree.leaves), (
        "a prompt in two parts, or an empty part"
    )
    assert [max(a) < min(b) for a, b in pairwise(leaves)] == [True] * (parts - 1)


def test_the_parts_are_about_equal():
    tree = _tree([[i % 7 + 1, 10 + i, *[3] * (i % 5)] for i in range(300)])
    for parts in (2, 3, 8):
        rows = [len(tree.ancestors(tree.eot[share])) for share in balanced_shares(tree, parts)]
        assert max(rows) <= len(tree) / parts + 2 * tree.max_depth


def test_more_ranks_than_classes_are_refused():
    with pytest.raises(UserError, match="3 classes cannot be shared by 4 ranks"):
        balanced_shares(_tree([[1], [2], [3], [3]]), 4)


def _tree(names):
    ids = torch.zeros(len(names), 77, dtype=torch.int64)
    for k, name in enumerate(names):
        row = [900, 7, 7, *name, 999]
        ids[k, : len(row)] = torch.tensor(row)
    return ClassTree(ids, 2)


def test_a_process_alone_needs_nobody():
    tensor = torch.randn(3)
    assert (
        ALONE.is_first and ALONE.everyone.gather(tensor)[0] is tensor and ALONE.everyone.sum(tensor) is tensor
    )
    assert (
        ALONE.from_first(lambda: 5) == 5 and ALONE.highest(2) == 2 and ALONE.own_device("cuda:3") == "cuda:3"
    )
    assert ALONE.arranged("both", 1).classes.size == 1
    ALONE.check_alike("anything", object())


def test_every_rank_has_its_own_gpu():
    ranks = Ranks(Group(3, 4), local_index=1, local_size=2)
    assert ranks.own_device("auto", gpus=2) == ranks.own_device("cuda", gpus=2) == "cuda:1"
    assert ranks.own_device("auto", gpus=0) == ranks.own_device("cpu", gpus=2) == "cpu"
    with pytest.raises(UserError, match="The device 'cuda:0' is one, and there are 2 ranks on this machine"):
        ranks.own_device("cuda:0", gpus=2)
    with pytest.raises(UserError, match="2 ranks were started on a machine with 1 GPUs"):
        ranks.own_device("auto", gpus=1)


def _launched(monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(name, value)


def test_ranks_that_do_not_find_each_other(monkeypatch):
    _launched(monkeypatch)
    sentence = "The 2 ranks of this run did not find each other"
    with pytest.raises(UserError, match=sentence), launch.join(timedelta(seconds=1)):
        pass


def test_other_commands_are_not_for_torchrun(monkeypatch, capsys):
    _launched(monkeypatch)
    assert run(["bench"]) == 2
    assert capsys.readouterr().err == "error: torchrun can share out train and eval; run bench without it.\n"
