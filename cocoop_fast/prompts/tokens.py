"""Class names to prompts, as CLIP token ids."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cocoop_fast.clip.tokenizer import encode, tokenizer
from cocoop_fast.data.dataset import prompt_name
from cocoop_fast.errors import UserError


@dataclass(frozen=True)
class TokenizedPrompts:
    """K prompts "<context> <name>." as token ids; before the context there may be attributes with contexts of their own."""

    tokens: Tensor  # (K, L) int64: SOS, what is ahead, context, name, ".", EOT, padded with 0
    n_ctx: int  # M
    name_lens: list[int]  # tokens of each name alone
    attributes: tuple[tuple[int, ...], ...] = ()  # tokens of each word that M others stand before

    @property
    def n_before_name(self) -> int:
        """Tokens between SOS and the name."""
        return self.n_ctx + sum(self.n_ctx + len(word) for word in self.attributes)


def spell_names(classnames: Sequence[str]) -> list[str]:
    """The names as they stand in a prompt.

    Raises:
        UserError: no classes, or an empty name.
    """
    if isinstance(classnames, str | Mapping) or not hasattr(classnames, "__len__") or not len(classnames):
        raise UserError(f"The class list must be a non-empty list of names, got {repr(classnames)[:200]}.")
    other = next((name for name in classnames if not isinstance(name, str)), None)
    if other is not None or None in classnames:
        raise UserError(f"A class name must be text, got {repr(other)[:200]}; write names as str(name).")
    names = [prompt_name(name) for name in classnames]
    for k, name in enumerate(names):
        if not encode(name):
            raise UserError(f"Class {k} has an empty name; give every class at least one word.")
    return names


def tokenize_prompts(
    classnames: Sequence[str],
    *,
    ctx_init: str = "",
    n_ctx: int = 16,
    attributes: Sequence[str] = (),
    context_length: int = 77,
) -> TokenizedPrompts:
    """Tokenize "<ctx_init> <name>." for each class, or "X X .. X <name>." with `n_ctx` placeholders.

    With `ctx_init`, M is the number of its *tokens*. (The reference counts its words, and so cuts the context
    short when a word has several tokens.) Before it stand M placeholders and a word for each attribute:
    "X X color X X shape X X <name>.".

    Raises:
        UserError: no classes, an empty name or attribute, or a prompt that does not fit the context length.
    """
    words = spell_attributes(attributes)
    prefix = prompt_name(ctx_init)
    if prefix:
        n_ctx = len(encode(prefix))
    elif n_ctx < 1:
        raise UserError(f"The number of context tokens must be at least 1, got {n_ctx}.")
    else:
        prefix = " ".join(["X"] * n_ctx)
    ahead = "".join(f"{'X ' * n_ctx}{word} " for word in words)
    tokens = tokenize_names(classnames, before=f"{ahead}{prefix} ", after=".", context_length=context_length)
    name_lens = [len(encode(name)) for name in spell_names(classnames)]
    return TokenizedPrompts(tokens, n_ctx, name_lens, tuple(map(encode, words)))


def spell_attributes(attributes: Sequence[str]) -> list[str]:
    """Attributes as they stand in a prompt.

    Raises:
        UserError: one that is empty, or the same one twice.
    """
    words = [prompt_name(word) for word in attributes]
    for given, word in zip(attributes, words, strict=True):
        if not encode(word):
            raise UserError(f"An attribute must have letters, got {given!r}; list them as in color,shape.")
    twice = next((word for n, word in enumerate(words) if word in words[:n]), None)
    if twice is not None:
        raise UserError(f"The attribute {twice!r} is listed twice; list each once.")
    return words


def tokenize_names(classnames: Sequence[str], *, before: str, after: str, context_length: int = 77) -> Tensor:
    """Tokenize "<before><name><after>" for each class.

    Classes whose prompts are the same are legal, but cannot be told apart: a warning names them.

    Returns:
        (K, L) int64 ids: SOS, the text, EOT, padded with 0.

    Raises:
        UserError: no classes, an empty name, or a prompt that does not fit the context length.
    """
    names = spell_names(classnames)
    prompts = [encode(f"{before}{name}{after}") for name in names]
    tokens = pad_prompts(prompts, names, context_length)
    first: dict[Sequence[int], int] = {}
    pairs = [
        f"{first[prompt]} and {k} ('{classnames[k]}')"
        for k, prompt in enumerate(prompts)
        if first.setdefault(prompt, k) != k
    ]
    if pairs:
        warnings.warn(
            f"Classes with the same prompt cannot be told apart: {_some(pairs)}. They keep their own labels.",
            stacklevel=2,
        )
    return tokens


def pad_prompts(prompts: Sequence[Sequence[int]], names: Sequence[str], context_length: int) -> Tensor:
    """Prompts of K named classes, with SOS and EOT around them, as one (K, L) int64 tensor padded with 0.

    Raises:
        UserError: a prompt does not fit the context length.
    """
    sos, eot = tokenizer().sot_token_id, tokenizer().eot_token_id
    rows = []
    for k, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        padding = context_length - len(prompt) - 2
        if padding < 0:
            raise UserError(
                f"The prompt of class {k}, '{_shorten(name)}', has {len(prompt) + 2} tokens ({len(encode(name))} of "
                f"them its name), but the model reads {context_length}; shorten the name or the context."
            )
        rows.append([sos, *prompt, eot, *[0] * padding])
    return torch.tensor(rows)


def warn_of_unknown_words(classnames: Sequence[str], known: frozenset[int]) -> None:
    """Warn of classes whose name has a token that the model was not trained on."""
    if sentence := about_unknown_words(classnames, known):
        warnings.warn(sentence, stacklevel=3)


def about_unknown_words(classnames: Sequence[str], known: frozenset[int] | None) -> str:
    """Names the classes whose name has a token that the model was not trained on; empty if there is none.

    Args:
        classnames: K names.
        known: the tokens it was trained on; ``None``: all.
    """
    if known is None:
        return ""
    unknown = [repr(_shorten(name)) for name in spell_names(classnames) if not known.issuperset(encode(name))]
    if not unknown:
        return ""
    return f"The model never saw the words of {_some(unknown)}: what it says of such classes means little."


def _some(items: Sequence[str]) -> str:
    return f"{', '.join(items[:5])}{' and others' if len(items) > 5 else ''}"


def _shorten(name: str, limit: int = 40) -> str:
    return name if len(name) <= limit else f"{name[: limit - 3]}..."
