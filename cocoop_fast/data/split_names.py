"""How folders and lists call the splits: Training, valid, test_set and others mean train, val and test."""

from __future__ import annotations

import re

SPLITS = ("train", "val", "test")
_SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "development"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {spelling: split for split, spellings in _SPELLINGS.items() for spelling in spellings}
_UNCLEAR = frozenset({"eval", "evaluation", "holdout"})  # val to some, test to others
_ENDING = re.compile(r"(set|sets|split|data|images?|imgs?)$")


def split_of(name: str) -> str | None:
    """The split that a name means, in any case, with or without such an ending as "_set"; ``None``: none."""
    word = re.sub(r"[\s_.-]+", "", name.casefold())
    return _SPLIT_OF.get(word) or _SPLIT_OF.get(_ENDING.sub("", word))


def looks_like_split(name: str) -> bool:
    """Whether one of a name's words is called like a split, as in "seg_train"."""
    words = re.findall(r"[a-z]+", name.casefold())
    return split_of(name) is not None or any(word in _SPLIT_OF or word in _UNCLEAR for word in words)
