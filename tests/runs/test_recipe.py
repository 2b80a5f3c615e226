"""What a configuration leaves open is filled from the method and the data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig, from_mapping, to_mapping
from cocoop_fast.data import load_dataset
from cocoop_fast.runs.recipe import resolve, with_method

DIGITS = load_dataset(DataConfig())


def resolved(**values):
    return resolve(from_mapping(values), DIGITS)


def test_cocoop():
    config = resolved(model={"device": "cpu"})
    assert (config.optim.batch_size, config.optim.epochs) == (1, 10)
    assert (config.augment.crop_scale, config.augment.flip) == (DIGITS.crop_scale, 0.0)
    assert config.prompt.template == "a photo of a {}."
    assert config.model.precision == "fp32"
    assert config.output_dir == Path("output/digits/cocoop/seed1")


@pytest.mark.parametrize(
    ("name", "root", "place"),
    [
        ("folder", "photos/cats", "folder-cats"),
        ("list", "photos/cats.csv", "list-cats.csv"),
        ("oxford_pets", "photos/cats", "oxford_pets"),
        ("folder", "/", "folder"),
    ],
)
def test_ones_own_images_have_a_directory_by_their_name(name, root, place):
    config = resolved(data={"name": name, "root": root}, model={"device": "cpu"})
    assert config.output_dir == Path("output") / place / "cocoop/seed1"


@pytest.mark.parametrize(("shots", "epochs"), [(16, 200), (8, 200), (4, 100), (2, 100), (1, 50), (0, 50)])
def test_coop_trains_longer_on_more_shots(shots, epochs):
    config = resolved(prompt={"method": "coop"}, data={"shots": shots})
    assert (config.optim.batch_size, config.optim.epochs) == (32, epochs)
    assert config.prompt.ctx_init == "a photo of a"


def test_coop_trains_as_long_on_imagenet_whatever_the_shots():
    imagenet = replace(DIGITS, name="imagenet")
    for shots in (1, 16):
        config = from_mapping({"prompt": {"method": "coop"}, "data": {"shots": shots}})
        assert resolve(config, imagenet).optim.epochs == 50
    assert resolve(from_mapping({}), imagenet).optim.epochs == 10


def test_zeroshot_trains_nothing():
    assert resolved(prompt={"method": "zeroshot"}, optim={"epochs": 7}).optim.epochs == 0


def test_what_is_given_stays():
    config = resolved(
        optim={"epochs": 3, "batch_size": 4},
        augment={"crop_scale": [0.5, 0.9], "flip": 0.25},
        prompt={"template": "one {}"},
        output_dir="here",
    )
    assert (config.optim.epochs, config.optim.batch_size) == (3, 4)
    assert (config.augment.crop_scale, config.augment.flip) == ((0.5, 0.9), 0.25)
    assert (config.prompt.template, config.output_dir) == ("one {}", Path("here"))
    assert resolve(config, DIGITS) == config


def test_only_places_of_weights_and_data_and_what_the_machine_has_stay_open():
    open_fields = [
        f"{section}.{name}"
        for section, values in to_mapping(resolved()).items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value is None
    ]
    assert open_fields == [
        "model.pretrained",
        "model.memory_budget",
        "data.root",
        "data.class_names",
        "data.few_shot",
        "data.workers",
    ]


def test_a_compared_method_has_its_own_recipe():
    config = with_method(from_mapping({"optim": {"epochs": 3, "lr": 0.01}}), "coop", Path("x/coop"))
    own = resolve(config, DIGITS)
    assert (own.prompt.method, own.optim.epochs, own.optim.batch_size, own.optim.lr) == (
        "coop",
        200,
        32,
        0.01,
    )
    assert own.output_dir == Path("x/coop")


def test_crop_bounds_in_the_wrong_order():
    with pytest.raises(UserError, match=r"crop_scale is 0.9 to 0.5; give the smaller share first"):
        resolved(augment={"crop_scale": [0.9, 0.5]})
