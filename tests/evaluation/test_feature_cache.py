"""Cached features: what was computed comes back, what is stale or damaged does not."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_clip
from tiny_runs import loaded_tiny_clip, write_images

from cocoop_fast.config import DataConfig, PromptConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.evaluation.evaluate import encode_test_images
from cocoop_fast.evaluation.feature_cache import FeatureCache
from cocoop_fast.methods import build_model


@pytest.fixture(scope="module")
def clip():
    return loaded_tiny_clip()


@pytest.fixture
def images(tmp_path):
    """Twelve test images of four classes."""
    for seed, name in enumerate("abcd"):
        write_images(tmp_path / "data" / name, 9, seed)
    return load_dataset(DataConfig(name="folder", root=tmp_path / "data"))


class Encoder:
    """Encodes images, and counts them."""

    def __init__(self, clip, dataset):
        self.clip, self.dataset, self.count = clip, dataset, 0
        self.model = build_model(PromptConfig(method="zeroshot"), list(dataset.classnames), clip)

    def __call__(self, samples):
        self.count += len(samples)
        return encode_test_images(self.model, self.clip, self.dataset.with_splits(test=samples)).image


def fill(cache, clip, dataset):
    encoder = Encoder(clip, dataset)
    found = cache.find_or_make(clip, dataset, dataset.test, encoder)
    return found, encoder.count


def test_features_come_back_as_they_were(tmp_path, clip, images):
    cache = FeatureCache(tmp_path / "cache")
    assert cache.find(clip, images) is None
    made, encoded = fill(cache, clip, images)
    again, encoded_again = fill(FeatureCache(tmp_path / "cache"), clip, images)
    assert (encoded, encoded_again) == (len(images.test), 0) and encoded > 4
    assert torch.equal(made.image, again.image) and made.samples == again.samples == images.test
    fresh = Encoder(clip, images)(images.test)
    assert torch.equal(again.image, fresh)


@pytest.mark.parametrize("subset", ["base", "new", "all"])
def test_a_selection_has_the_rows_and_labels_of_its_images(tmp_path, clip, images, subset):
    made, _ = fill(FeatureCache(tmp_path / "cache"), clip, images)
    chosen = select_classes(images, subset)
    features = made.select(chosen.test, clip.device)
    assert features.label.tolist() == [sample.label for sample in chosen.test]
    expected = [images.test.index(next(s for s in images.test if s.source == c.source)) for c in chosen.test]
    assert torch.equal(features.image, made.image[expected])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_kept(tmp_path, clip, images, dtype):
    cache = FeatureCache(tmp_path / "cache")
    low = replace(clip, precision="bf16" if dtype is torch.bfloat16 else "fp16")
    image = torch.randn(len(images.test), 8).to(dtype)
    cache.find_or_make(low, images, images.test, lambda samples: image)
    found = cache.find(low, images)
    assert found.image.dtype == dtype and torch.equal(found.image, image)
    assert cache.find(clip, images) is None  # another precision


def test_whatever_decides_the_features_is_part_of_the_key(tmp_path, clip, images):
    cache = FeatureCache(tmp_path / "cache")
    fill(cache, clip, images)
    assert cache.find(clip, images) is not None
    other_weights = replace(clip, model=tiny_clip(layers=2, seed=1))
    other_activation = replace(clip, model=tiny_clip(layers=2, quick_gelu=False))
    assert cache.find(other_weights, images) is None
    assert cache.find(other_activation, images) is None
    assert cache.find(replace(clip, image_size=clip.image_size + 1), images) is None
    assert cache.find(replace(clip, mean=(0.4, 0.5, 0.5)), images) is None
    assert cache.find(clip, images.with_splits(test=images.test[1:])) is None
    assert cache.find(clip, images.with_splits(test=images.test[::-1])) is None
    # The same weights in another object are the same.
    assert cache.find(replace(clip, model=tiny_clip(layers=2)), images) is not None


def test_one_changed_weight_is_noticed(tmp_path, images):
    clip = loaded_tiny_clip()
    cache = FeatureCache(tmp_path / "cache")
    fill(cache, clip, images)
    changed = loaded_tiny_clip()
    with torch.no_grad():
        changed.model.visual.proj[0, 0] += 1e-6
    assert cache.find(changed, images) is None


def test_a_replaced_image_is_noticed(tmp_path, clip, images):
    cache = FeatureCache(tmp_path / "cache")
    fill(cache, clip, images)
    path = tmp_path / "data" / images.test[2].source
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cache.find(clip, images) is None
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.find(clip, images) is not None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "bit of the header"])
def test_a_damaged_file_is_made_again(tmp_path, clip, images, damage):
    said = []
    cache = FeatureCache(tmp_path / "cache", said.append)
    made, _ = fill(cache, clip, images)
    [file] = (tmp_path / "cache").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[:-100],
            "flip": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
            "empty": b"",
            "text": b"no tensors",
            "bit of the header": whole[:20] + bytes([whole[20] ^ 1]) + whole[21:],
        }[damage]
    )
    assert cache.find(clip, images) is None
    assert len(said) == 1 and "is damaged" in said[0] and str(file) in said[0]
    again, encoded = fill(cache, clip, images)
    assert encoded == len(images.test) and torch.equal(again.image, made.image)
    assert torch.equal(cache.find(clip, images).image, made.image) and len(said) == 1


def test_images_left_out_stay_out(tmp_path, clip, images):
    cache = FeatureCache(tmp_path / "cache")
    readable = images.test[:3] + images.test[4:]
    cache.find_or_make(clip, images, readable, Encoder(clip, images))
    found = cache.find(clip, images)
    assert found.samples == readable and len(found.image) == len(readable)


def test_an_interrupted_write_leaves_nothing_to_find(tmp_path, clip, images):
    cache = FeatureCache(tmp_path / "cache")

    def interrupted(samples):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.find_or_make(clip, images, images.test, interrupted)
    assert cache.find(clip, images) is None
    assert fill(cache, clip, images)[1] == len(images.test)


def test_the_file_is_a_plain_safetensors_file(tmp_path, clip, images):
    fill(FeatureCache(tmp_path / "cache"), clip, images)
    [file] = (tmp_path / "cache").glob("folder-*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert sorted(opened.keys()) == ["image", "rows"]
        assert opened.get_tensor("rows").tolist() == list(range(len(images.test)))
        assert opened.metadata()["made for"] == "folder"
