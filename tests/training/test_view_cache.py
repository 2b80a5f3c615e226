"""Cached views: the crops of the first epochs come again, and a file that is stale or torn is never read."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_clip
from tiny_runs import StopAfter, loaded_tiny_clip, tiny_config, use_tiny_clip, write_images
from tiny_training import clip_model, fast_model, make_batches

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.experiments.experiment import run
from cocoop_fast.runs.directory import read_run
from cocoop_fast.training.features import ImageFeatures
from cocoop_fast.training.view_cache import CachedViews


def source(folder, *, views=2, batches=None, clip=None, said=None, encoded=None):
    """Cached views; ``encoded`` gets the number of images of each call of the encoder."""
    model = fast_model()
    if encoded is not None:
        model.image_encoder.register_forward_hook(lambda _, images, features: encoded.append(len(features)))
    loaded = clip or replace(loaded_tiny_clip(), model=clip_model())
    batches = batches or make_batches(23, 3)
    return CachedViews(model, loaded, batches, views, folder, pytest.fail if said is None else said.append)


def images_encoded(folder, *epochs, **fields):
    encoded = []
    cached = source(folder, encoded=encoded, **fields)
    for epoch in epochs:
        list(cached.epoch(epoch))
    return sum(encoded)


@pytest.mark.parametrize("first_batch", [0, 5])
def test_the_views_of_the_first_epochs_come_again(tmp_path, first_batch):
    cached, batches = source(tmp_path), make_batches(23, 3)
    fresh = ImageFeatures(fast_model(), batches, "fp32", torch.device("cpu"), groups_ahead=0)
    for epoch in (1, 2):
        pairs = list(zip(cached.epoch(epoch, first_batch), fresh.epoch(epoch, first_batch), strict=True))
        assert len(pairs) == 7 - first_batch
        for ours, theirs in pairs:
            assert ours.batch.sample.equal(theirs.batch.sample) and ours.label.equal(theirs.label)
            torch.testing.assert_close(ours.features, theirs.features, rtol=1e-5, atol=1e-6)
    by_sample = {}
    for epoch in (1, 3):  # in another order, the same views
        found = {
            int(i): f
            for one in cached.epoch(epoch)
            for i, f in zip(one.batch.sample, one.features, strict=True)
        }
        by_sample[epoch] = found
    common = by_sample[1].keys() & by_sample[3].keys()
    assert len(common) > 15 and all(by_sample[1][i].equal(by_sample[3][i]) for i in common)


def test_each_view_is_encoded_once_for_all_runs(tmp_path):
    assert images_encoded(tmp_path, 1, 2, 3, 4, 5) == 46
    assert images_encoded(tmp_path, 1, 2, 3) == 0
    assert images_encoded(tmp_path, 1, 2, 3, views=3) == 23  # two of its views are there
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_what_decides_a_view_is_in_its_name(tmp_path):
    assert images_encoded(tmp_path, 1) == 23
    batches = make_batches(23, 3)
    changed = [
        replace(batches, seed=2),
        replace(batches, transform=replace(batches.transform, flip=0.25)),
        replace(batches, samples=batches.samples[:22]),
    ]
    assert [images_encoded(tmp_path, 1, batches=other) for other in changed] == [23, 23, 22]
    other = replace(loaded_tiny_clip(), model=tiny_clip(layers=2, seed=3))
    assert images_encoded(tmp_path, 1, clip=other) == 23
    # The batch size does not decide it.
    assert images_encoded(tmp_path, 1, batches=replace(batches, batch_size=5)) == 0


@pytest.mark.parametrize("damage", ["torn", "altered", "empty"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    wanted = [one.features for one in source(tmp_path).epoch(1)]
    [file] = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(
        {"torn": whole[:-64], "altered": whole[:-64] + bytes([whole[-64] ^ 1]) + whole[-63:], "empty": b""}[
            damage
        ]
    )
    said, encoded = [], []
    again = [one.features for one in source(tmp_path, said=said, encoded=encoded).epoch(1)]
    assert sum(encoded) == 23 and len(said) == 1 and "is damaged" in said[0]
    assert all(ours.equal(theirs) for ours, theirs in zip(again, wanted, strict=True))


def test_a_changed_image_is_noticed(tmp_path):
    for name in "ab":
        write_images(tmp_path / "data" / name, 6)
    dataset = load_dataset(DataConfig(name="folder", root=tmp_path / "data"))
    batches = replace(make_batches(1, 1), dataset=dataset, samples=dataset.train)
    n = len(dataset.train)
    folder = tmp_path / "views"
    assert images_encoded(folder, 1, batches=batches) == n
    assert images_encoded(folder, 1, batches=batches) == 0
    os.utime(tmp_path / "data" / str(dataset.train[0].source), ns=(1, 1))
    assert images_encoded(folder, 1, batches=batches) == n


def test_runs(tmp_path, monkeypatch):
    """A run is the same whether its views were cached before, and however it was interrupted; others are refused."""
    use_tiny_clip(monkeypatch)
    fields = {"data__cache_views": 2, "optim__epochs": 4}
    run(tiny_config(tmp_path / "whole", **fields))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(tmp_path / "parts", checkpoint_steps=4, **fields), observer=StopAfter(25))
    run(tiny_config(tmp_path / "parts", **fields))
    (_, whole), (_, parts) = read_run(tmp_path / "whole"), read_run(tmp_path / "parts")
    assert whole.step == parts.step == 40
    assert all(parts.parameters[name].equal(value) for name, value in whole.parameters.items())
    assert len(list((tmp_path / "whole" / "views").glob("*.safetensors"))) == 2
    with pytest.raises(UserError, match=r"data.cache_views is 2 there and 3 here"):
        run(tiny_config(tmp_path / "whole", data__cache_views=3, optim__epochs=4))
    run(tiny_config(tmp_path / "whole"), overwrite=True)
    assert not (tmp_path / "whole" / "views").exists()
