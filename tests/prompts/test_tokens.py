"""Class names to token ids: what is warned of, and how often a text is encoded."""

from __future__ import annotations

import pytest

from cocoop_fast.clip.tokenizer import encode, tokenizer
from cocoop_fast.prompts.layout import layout_at
from cocoop_fast.prompts.tokens import tokenize_prompts, warn_of_unknown_words
from cocoop_fast.prompts.tree import ClassTree


def test_words_that_the_model_never_saw_warn():
    known = frozenset(encode("digit zero one"))
    with pytest.warns(UserWarning, match=r"never saw the words of 'black swan', 'digit two'"):
        warn_of_unknown_words(["digit_zero", "black swan", "digit two", "one"], known)


def test_duplicates_warn_and_name_the_classes():
    with pytest.warns(UserWarning, match=r"0 and 2 \('Crane'\)"):
        tokenize_prompts(["crane", "maillot", "Crane"], n_ctx=4)


def test_ids_are_the_tokenizers():
    names = ["tabby_cat", "crane (bird)", "d'Artagnan &amp; Cie", "Ü-Boot 42"]
    prompts = tokenize_prompts(names, ctx_init="a photo_of a")
    own = tokenizer()([f"a photo of a {name.replace('_', ' ')}." for name in names])
    assert prompts.tokens.equal(own) and prompts.n_ctx == 4
    assert prompts.name_lens == [len(tokenizer().encode(name.replace("_", " "))) for name in names]


def test_each_name_and_each_prompt_is_encoded_once():
    names = [f"class {k}" for k in range(50)]
    encode.cache_clear()
    ClassTree.from_layout(layout_at(tokenize_prompts(names, ctx_init="a photo of a"), "middle"))
    warn_of_unknown_words(names, frozenset(range(49408)))
    assert encode.cache_info().misses == 2 * len(names) + 1
