"""CLIP's byte-pair tokenizer; OpenAI's and open_clip's models share it."""

from __future__ import annotations

from functools import lru_cache

from open_clip.tokenizer import SimpleTokenizer


@lru_cache(maxsize=1)
def tokenizer() -> SimpleTokenizer:
    """The tokenizer itself: its vocabulary and special tokens."""
    return SimpleTokenizer()


@lru_cache(maxsize=1 << 16)  # of ImageNet-22k the names and their prompts; some 20 MB
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text, without start and end of text. Kept, since cleaning the text takes most of the time."""
    return tuple(tokenizer().encode(text))


def word_of(token: int) -> str:
    """A token as people write it; a piece that a word goes on after ends in a hyphen."""
    text = tokenizer().decoder[token]
    return text.removesuffix("</w>") if text.endswith("</w>") or text.startswith("<") else f"{text}-"
