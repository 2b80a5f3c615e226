"""Icons: names, splits and pixels."""

from __future__ import annotations

import importlib.util
from collections import Counter
from hashlib import blake2b

import numpy as np
import pytest

from cocoop_fast import cli
from cocoop_fast.config import DataConfig
from cocoop_fast.data import icons
from cocoop_fast.data.few_shot import sample_shots
from cocoop_fast.data.registry import REGISTRY, load_dataset
from cocoop_fast.errors import UserError


def load(name):
    return load_dataset(DataConfig(name=name))


def drawings(samples):
    return {str(sample.source).rsplit("/", 1)[0] for sample in samples}


def test_names_are_words():
    names = load("icons").classnames
    assert {"anchor", "bell slash", "cloud rain", "magnifying glass plus"} <= set(names)
    assert len(set(names)) == len(names) == 238 and list(names) == sorted(
        names, key=lambda n: n.replace(" ", "-")
    )


@pytest.mark.parametrize("name", icons.ICON_SETS)
def test_counts_are_those_of_the_page(name, docs_datasets):
    dataset = load(name)
    row = next(line for line in docs_datasets if f"`{name}`" in line and line.startswith("|"))
    sizes = " / ".join(f"{len(split):,}" if not dataset.test_only or split else "-"
                       for split in (dataset.train, dataset.val, dataset.test))  # fmt: skip
    assert [cell.strip() for cell in row.split("|")[2:4]] == [str(len(dataset.classnames)), sizes]


@pytest.fixture(scope="module")
def docs_datasets(request):
    return (request.config.rootpath / "docs" / "datasets.md").read_text(encoding="utf-8").splitlines()


def test_no_drawing_is_in_two_splits():
    dataset = load("icons")
    train, val, test = (drawings(split) for split in (dataset.train, dataset.val, dataset.test))
    assert not train & test and not train & val and not val & test
    every = Counter(sample.label for sample in dataset.train)
    assert len(every) == 238 and min(every.values()) >= 3 * icons.PRINTS
    assert load("icons").train == dataset.train
    first = sample_shots(dataset, 4, seed=1)
    assert all(count == 4 for count in Counter(sample.label for sample in first.train).values())


def test_domains_share_names_and_no_style():
    source = load("icons_phosphor")
    styles = {str(sample.source).split("/")[0] for sample in (*source.train, *source.test)}
    assert styles == {"phosphor-regular", "phosphor-light", "phosphor-bold"}
    for name in ("icons_thin", "icons_fill", "icons_fontawesome", "icons_elusive"):
        target = load(name)
        assert set(target.classnames) <= set(source.classnames)
        assert not styles & {str(sample.source).split("/")[0] for sample in target.test}
        assert {target.classnames[sample.label] for sample in target.test} == set(target.classnames)
    assert not set(load("icons_others").classnames) & set(source.classnames)


def test_every_drawing_shows_something():
    """A name whose character a font lacks would be an empty box, the same for all such names."""
    seen = Counter()
    for name in ("icons", "icons_others"):
        dataset = load(name)
        for sample in (*dataset.train, *dataset.val, *dataset.test):
            if str(sample.source).endswith("/0"):
                pixels = np.asarray(dataset.read(sample))
                assert pixels.shape == (96, 96, 3) and 0.004 < (pixels < 128).mean() < 0.75, sample
                seen[blake2b(pixels.tobytes()).digest()] += 1
    assert max(seen.values()) <= 4  # one drawing under several names, or in two versions of a font


def test_prints_differ_and_are_the_same_each_time():
    dataset = load("icons")
    first = dataset.test[: icons.PRINTS]
    prints = [np.asarray(dataset.read(sample)) for sample in first]
    assert len({one.tobytes() for one in prints}) == icons.PRINTS
    assert (prints[0][0, 0] == 255).all()  # white paper
    icons._glyph.cache_clear()
    for sample, one in zip(first, prints, strict=True):
        assert (np.asarray(dataset.read(sample)) == one).all()


def test_ink_stands_out():
    dataset = load("icons")
    for sample in dataset.test[1::97]:
        grey = np.asarray(dataset.read(sample).convert("L")).astype(float)
        assert grey.max() - grey.min() > 255 * 0.35, sample


def test_without_the_fonts(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qtawesome" else find(name))
    icons.fonts.cache_clear()
    icons.characters.cache_clear()
    assert REGISTRY["icons"].missing(DataConfig(name="icons")) == ("the package qtawesome",)
    with pytest.raises(UserError, match=r"run `pip install 'cocoop-fast\[icons\]'`"):
        load("icons")
    assert cli.run(["train", "--dataset", "icons"]) == 1
    error = capsys.readouterr().err
    assert "qtawesome" in error and "Traceback" not in error
