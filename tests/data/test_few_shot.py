"""Few-shot sampling and base/new classes against an independent account of the reference's algorithm."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import Dataset, Sample, load_dataset
from cocoop_fast.data.few_shot import sample_shots, select_classes


def dataset(
    train: list[int], val: list[int] = (), test: list[int] = (), n_classes: int | None = None
) -> Dataset:
    """A data set whose labels are given; sources are unique."""
    n_classes = n_classes or max([*train, *val, *test]) + 1
    names = tuple(f"class {label}" for label in range(n_classes))

    def samples(split: str, labels: list[int]) -> tuple[Sample, ...]:
        return tuple(Sample(f"{split}/{i}", label, names[label]) for i, label in enumerate(labels))

    return Dataset("fake", names, samples("a", train), samples("b", val), samples("c", test), read=None)


def expected_draw(seed: int, shots: int, train: list[int], val: list[int]) -> tuple[list[int], list[int]]:
    """Positions drawn, written down from the reference's description with the global generator it uses."""
    random.seed(seed)
    drawn = []
    for labels, k in ((train, shots), (val, min(shots, 4))):
        groups: dict[int, list[int]] = {}
        for position, label in enumerate(labels):
            groups.setdefault(label, []).append(position)
        picked = []
        for group in groups.values():
            picked.extend(group if len(group) < k else random.sample(group, k))
        drawn.append(picked)
    return drawn[0], drawn[1]


labels = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@settings(max_examples=100)
@given(labels, labels, st.integers(1, 20), st.integers(0, 1000))
def test_sampling_is_the_references(train, val, shots, seed):
    full = dataset(train, val, n_classes=6)
    sampled = sample_shots(full, shots, seed)
    expected_train, expected_val = expected_draw(seed, shots, train, val)
    assert sampled.train == tuple(full.train[i] for i in expected_train)
    assert sampled.val == tuple(full.val[i] for i in expected_val)


def test_sampling_leaves_the_global_generator_alone():
    random.seed(5)
    state = random.getstate()
    sample_shots(load_dataset(DataConfig()), 4, seed=1)
    assert random.getstate() == state


def test_all_classes_are_drawn_before_base_and_new_are_separated():
    full = load_dataset(DataConfig())
    sampled = sample_shots(full, 16, seed=3)
    base, new = select_classes(sampled, "base"), select_classes(sampled, "new")
    assert [s.source for s in base.train] + [s.source for s in new.train] == [s.source for s in sampled.train]
    # Drawing among the new classes alone would give others: their draws follow those of the base classes.
    alone = sample_shots(select_classes(full, "new"), 16, seed=3)
    assert alone.train != new.train


@pytest.mark.parametrize(("n", "base", "new"), [(10, 5, 5), (37, 19, 18), (101, 51, 50), (4, 2, 2)])
def test_base_is_the_larger_half_and_labels_start_at_zero(n, base, new):
    full = dataset(list(range(n)), test=list(range(n)) * 2)
    one, other = select_classes(full, "base"), select_classes(full, "new")
    assert (len(one.classnames), len(other.classnames)) == (base, new)
    assert one.classnames + other.classnames == full.classnames
    for part in (one, other):
        assert [sample.label for sample in part.train] == list(range(len(part.classnames)))
        assert all(part.classnames[s.label] == s.classname for s in (*part.train, *part.test))
    assert len(one.test) + len(other.test) == 2 * n


def test_too_few_classes_for_two_halves():
    with pytest.raises(UserError, match=r"3 classes.*data.subset all"):
        select_classes(dataset([0, 1, 2]), "base")
    assert select_classes(dataset([0, 1, 2]), "all").classnames == ("class 0", "class 1", "class 2")


def test_zero_shots_keep_everything():
    full = load_dataset(DataConfig())
    assert sample_shots(full, 0, seed=1) is full
    with pytest.raises(UserError, match=r"data.shots is -1"):
        sample_shots(full, -1, seed=1)
