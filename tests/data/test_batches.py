"""Batches: order, size, resuming in the middle, and independence of the number of workers."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from tiny_runs import write_images

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.batches import TrainBatches, test_batches
from cocoop_fast.data.transforms import Normalize, TestTransform, TrainTransform

NORMALIZE = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def data(tmp_path):
    for name in "abc":
        write_images(tmp_path / name, 11)
    return load_dataset(DataConfig(name="folder", root=tmp_path))


def batches(data, size=4, seed=1, workers=0):
    return TrainBatches(data, data.train, TrainTransform(16, (0.3, 1.0), 0.5, NORMALIZE), size, seed, workers)


def test_each_epoch_is_a_permutation_without_the_incomplete_batch(data):
    train = batches(data)
    assert len(data.train) == 18 and len(train) == 4
    seen = [torch.cat([batch.sample for batch in train.epoch(epoch)]) for epoch in (1, 2)]
    for indices in seen:
        assert len(set(indices.tolist())) == 16
    assert not torch.equal(seen[0], seen[1])
    for batch in train.epoch(1):
        assert batch.image.shape == (4, 3, 16, 16) and batch.label.dtype == torch.int64
        assert batch.label.tolist() == [data.train[i].label for i in batch.sample.tolist()]


def test_a_batch_larger_than_the_data_is_kept(data):
    [batch] = batches(data, size=100).epoch(1)
    assert len(batch.label) == 18 and len(batches(data, size=100)) == 1


def test_resuming_inside_an_epoch_gives_the_same_batches(data):
    whole = list(batches(data).epoch(3))
    for first in range(5):
        part = list(batches(data).epoch(3, first))
        assert len(part) == 4 - first
        for ours, theirs in zip(part, whole[first:], strict=True):
            assert torch.equal(ours.image, theirs.image) and torch.equal(ours.sample, theirs.sample)


@pytest.mark.parametrize("size", [1, 4, 5, 18])
def test_workers_and_global_state_change_nothing(data, size):
    """Of 18 images: one batch or several in a worker's message, the last message whole or not."""
    torch.manual_seed(1)
    alone = list(batches(data, size).epoch(1))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    many = list(batches(data, size, workers=2).epoch(1))
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(many, alone, strict=True):
        assert torch.equal(ours.image, theirs.image) and torch.equal(ours.label, theirs.label)


def test_seeds_differ(data):
    one, two = (next(iter(batches(data, seed=seed).epoch(1))) for seed in (1, 2))
    assert not torch.equal(one.sample, two.sample)


def test_test_batches_keep_the_order(data):
    found = list(test_batches(data, data.test, TestTransform(16, NORMALIZE), 4))
    assert [len(batch.label) for batch in found] == [4, 4, 1]
    assert torch.cat([batch.sample for batch in found]).tolist() == list(range(9))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named(data, tmp_path, workers):
    train = batches(data, size=18, workers=workers)
    (tmp_path / str(data.train[3].source)).unlink()
    with pytest.raises(
        UserError, match=rf"^The image {data.train[3].source} .*can no longer be read \(missing\)"
    ):
        list(train.epoch(1))


@pytest.mark.parametrize("size", [1, 3])
def test_what_comes_before_an_image_that_vanished_is_there(data, tmp_path, size):
    """Whoever reads the images, and however many batches a message has."""
    order = list(chain.from_iterable(batches(data, size).picks(1)))
    (tmp_path / str(data.train[order[7]].source)).unlink()
    for workers in (0, 2):
        found = []
        with pytest.raises(UserError, match="can no longer be read"):
            for batch in batches(data, size, workers=workers).epoch(1):
                found.append(batch.sample)
        assert torch.cat(found).tolist() == order[: 7 - 7 % size]


def test_no_images(data):
    with pytest.raises(UserError, match=r"no images to train on"):
        TrainBatches(data, (), TrainTransform(16, (1, 1), 0, NORMALIZE), 1, 1).epoch(1)


def test_description(data):
    train = batches(data, size=5)
    batch = next(iter(train.epoch(1)))
    text = train.describe(batch.sample)
    assert text.endswith(" and 2 more") and str(data.train[int(batch.sample[0])].source) in text
