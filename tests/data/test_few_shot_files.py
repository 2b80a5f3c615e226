"""Few-shot samples on disk: what is written is read again, and what does not fit is refused."""

from __future__ import annotations

import json

import pytest
from miniature_sets import WRITERS
from reference_pickles import write_reference_cache

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.dataset import Splits
from cocoop_fast.data.few_shot import sample_shots
from cocoop_fast.data.few_shot_files import few_shot_sample, read_few_shot, write_few_shot
from cocoop_fast.data.split_file import write_split


@pytest.fixture
def pets(tmp_path):
    WRITERS["oxford_pets"](tmp_path)
    return load_dataset(DataConfig(name="oxford_pets", root=tmp_path))


def config(**fields):
    return DataConfig(name="oxford_pets", **{"shots": 2, **fields})


def test_a_manifest_is_portable(pets, tmp_path):
    drawn = sample_shots(pets, 2, seed=7)
    path = write_few_shot(tmp_path / "samples", drawn, 2, seed=7)
    text = path.read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["train"][0] == [
        drawn.train[0].source,
        drawn.train[0].label,
        drawn.train[0].classname,
    ]

    WRITERS["oxford_pets"](tmp_path / "another machine")
    split = "oxford_pets/split_zhou_OxfordPets.json"
    write_split(tmp_path / "another machine" / split, Splits(pets.train, pets.val, pets.test))
    there = load_dataset(DataConfig(name="oxford_pets", root=tmp_path / "another machine"))
    sample = read_few_shot(path, there, 2)
    assert (sample.train, sample.val, sample.test) == (drawn.train, drawn.val, there.test)


def test_the_name_says_what_is_inside(pets, tmp_path):
    one = write_few_shot(tmp_path, sample_shots(pets, 2, seed=7), 2, seed=7)
    again = write_few_shot(tmp_path / "again", sample_shots(pets, 2, seed=7), 2, seed=7)
    other = write_few_shot(tmp_path, sample_shots(pets, 2, seed=8), 2, seed=8)
    assert one.name == again.name and one.name.startswith("shot_2-seed_7-")
    assert one.stem[-12:] != other.stem[-12:]

    one.write_text(json.dumps(json.loads(one.read_text())))  # laid out otherwise
    assert read_few_shot(one, pets, 2).train == sample_shots(pets, 2, seed=7).train
    values = json.loads(one.read_text())
    values["train"][:2] = reversed(values["train"][:2])
    one.write_text(json.dumps(values))
    with pytest.raises(UserError, match="was changed after it was written"):
        read_few_shot(one, pets, 2)


def test_where_a_sample_comes_from(pets, tmp_path):
    """Named file, named directory, the directory beside the images, the draw: the first there is."""
    drawn = {seed: sample_shots(pets, 2, seed) for seed in (1, 2, 3)}
    messages = []

    def taken(seed=1, **fields):
        return few_shot_sample(pets, config(**fields), seed, messages.append).train

    assert taken() == drawn[1].train and messages == []
    beside = write_few_shot(pets.few_shot_dir, drawn[3], 2, seed=1)  # as if it were the draw of seed 1
    assert taken() == drawn[3].train
    assert messages == [f"The few-shot sample is read from {beside}."]
    assert taken(seed=2) == drawn[2].train  # nothing there for this seed
    named = write_few_shot(tmp_path / "named", drawn[2], 2, seed=1)
    assert taken(few_shot=named) == drawn[2].train
    assert taken(few_shot=named.parent) == drawn[2].train
    assert taken(shots=0) == pets.train


def test_a_cache_of_the_reference_is_used(pets):
    drawn = sample_shots(pets, 2, seed=5)
    write_reference_cache(
        pets.few_shot_dir / "shot_2-seed_1.pkl",
        "/home/someone/data/oxford_pets/images",
        drawn.train,
        drawn.val,
    )
    sample = few_shot_sample(pets, config(), seed=1)
    assert (sample.train, sample.val) == (drawn.train, drawn.val)


def test_a_cache_written_on_windows(pets, tmp_path):
    drawn = sample_shots(pets, 2, seed=5)
    path = tmp_path / "shot_2-seed_1.pkl"
    write_reference_cache(path, "C:\\data\\oxford_pets\\images", drawn.train, drawn.val, separator="\\")
    assert read_few_shot(path, pets, 2).train == drawn.train


def test_caches_of_imagenet_have_no_validation_images(tmp_path):
    WRITERS["imagenet"](tmp_path)
    data = load_dataset(DataConfig(name="imagenet", root=tmp_path))
    drawn = sample_shots(data, 2, seed=5)
    path = tmp_path / "shot_2-seed_1.pkl"
    write_reference_cache(path, "/data/imagenet/images", drawn.train, None)
    sample = read_few_shot(path, data, 2)
    assert (sample.train, sample.val) == (drawn.train, data.test)
    manifest = write_few_shot(tmp_path, drawn, 2, seed=5)
    assert json.loads(manifest.read_text())["val"] == []
    assert read_few_shot(manifest, data, 2).val == data.test


def test_digits_are_named_by_their_position(tmp_path):
    digits = load_dataset(DataConfig())
    drawn = sample_shots(digits, 2, seed=1)
    assert read_few_shot(write_few_shot(tmp_path, drawn, 2, seed=1), digits, 2).train == drawn.train


def test_a_sample_of_something_else_is_refused(pets, tmp_path):
    path = write_few_shot(tmp_path, sample_shots(pets, 2, seed=1), 2, seed=1)
    with pytest.raises(UserError, match="with shots 2, but this run has 4"):
        read_few_shot(path, pets, 4)
    with pytest.raises(UserError, match="with dataset 'oxford_pets', but this run has 'digits'"):
        read_few_shot(path, load_dataset(DataConfig()), 2)
    with pytest.raises(UserError, match="which is not among the images here"):
        drawn = sample_shots(pets, 2, seed=1).train
        read_few_shot(path, pets.with_splits(train=tuple(s for s in pets.train if s != drawn[0])), 2)

    values = json.loads(path.read_text())
    for name, change, says in (
        ("a row less", lambda v: v["train"].__setitem__(slice(0, 2), []), "has 0 training images of class"),
        ("a row more", lambda v: v["train"].append(v["train"][0]), "has 3 training images of class"),
        ("a path upwards", lambda v: v["train"][0].__setitem__(0, "../../secret"), "not among the images"),
        ("another label", lambda v: v["train"][0].__setitem__(1, 0), "not among the images"),
        ("a nested row", lambda v: v["train"].__setitem__(0, [[1], 2, 3]), "not among the images"),
        ("no list", lambda v: v.__setitem__("train", 3), "not among the images"),
        ("no format", lambda v: v.pop("format"), "is not a few-shot sample of this program"),
    ):
        changed = json.loads(json.dumps(values))
        change(changed)
        bad = tmp_path / f"{name}.json"
        bad.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=says):
            read_few_shot(bad, pets, 2)


def test_a_cache_of_another_split_is_refused(pets, tmp_path):
    drawn = sample_shots(pets, 2, seed=5)
    path = tmp_path / "shot_2-seed_1.pkl"
    write_reference_cache(path, "/data/oxford_pets/images", pets.test[:2], ())
    with pytest.raises(UserError, match="of another split: delete it"):
        read_few_shot(path, pets, 2)
    write_reference_cache(path, "/data/oxford_pets/images", drawn.train, drawn.val)
    with pytest.raises(UserError, match=r"has 2 training images of class .* but data\.shots is 1"):
        read_few_shot(path, pets, 1)


def test_what_cannot_be_chosen(pets, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        few_shot_sample(pets, config(few_shot=tmp_path / "none.json"), seed=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no few-shot sample for 2 shots and seed 1"):
        few_shot_sample(pets, config(few_shot=tmp_path / "empty"), seed=1)
    with pytest.raises(UserError, match=r"data\.shots is 0"):
        few_shot_sample(pets, config(few_shot=tmp_path / "empty", shots=0), seed=1)
    for seed in (1, 2):
        write_few_shot(pets.few_shot_dir, sample_shots(pets, 2, seed), 2, seed=1)
    with pytest.raises(UserError, match="has 2 few-shot samples for 2 shots and seed 1"):
        few_shot_sample(pets, config(), seed=1)
