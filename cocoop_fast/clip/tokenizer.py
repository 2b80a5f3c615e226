"""CLIP's byte-pair tokenizer."""

from __future__ import annotations

from functools import lru_cache

from open_clip.tokenizer import SimpleTokenizer


@lru_cache(maxsize=1)
def tokenizer() -> SimpleTokenizer:
    """CLIP's byte-pair tokenizer; OpenAI's and open_clip's models share it."""
    return SimpleTokenizer()
