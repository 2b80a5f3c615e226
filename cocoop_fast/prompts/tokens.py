"""Class names to prompts, as CLIP token ids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cocoop_fast.clip.tokenizer import tokenizer
from cocoop_fast.errors import UserError


@dataclass(frozen=True)
class TokenizedPrompts:
    """K prompts "<context> <name>." as token ids."""

    tokens: Tensor  # (K, L) int64: SOS, context, name, ".", EOT, padded with 0
    n_ctx: int  # M
    name_lens: list[int]  # tokens of each name alone


def tokenize_prompts(
    classnames: Sequence[str], *, ctx_init: str = "", n_ctx: int = 16, context_length: int = 77
) -> TokenizedPrompts:
    """Tokenize "<ctx_init> <name>." for each class, or "X X .. X <name>." with `n_ctx` placeholders.

    With `ctx_init`, M is the number of its *tokens*. (The reference counts its words, and so cuts the context
    short when a word has several tokens.)

    Raises:
        UserError: no classes, an empty name, or a prompt that does not fit the context length.
    """
    encode = tokenizer().encode
    prefix = ctx_init.replace("_", " ").strip()
    if prefix:
        n_ctx = len(encode(prefix))
    else:
        if n_ctx < 1:
            raise UserError(f"The number of context tokens must be at least 1, got {n_ctx}.")
        prefix = " ".join(["X"] * n_ctx)
    tokens = tokenize_names(classnames, before=f"{prefix} ", after=".", context_length=context_length)
    return TokenizedPrompts(tokens, n_ctx, [len(encode(_spell(name))) for name in classnames])


def tokenize_names(classnames: Sequence[str], *, before: str, after: str, context_length: int = 77) -> Tensor:
    """Tokenize "<before><name><after>" for each class; an underscore in a name counts as a space.

    Classes whose prompts are the same are legal, but cannot be told apart: a warning names them.

    Returns:
        (K, L) int64 ids: SOS, the text, EOT, padded with 0.

    Raises:
        UserError: no classes, an empty name, or a prompt that does not fit the context length.
    """
    encode, sos, eot = tokenizer().encode, tokenizer().sot_token_id, tokenizer().eot_token_id
    names = spell_names(classnames)
    rows = [[sos, *encode(f"{before}{name}{after}"), eot] for name in names]
    tokens = pad_prompts(rows, names, context_length)
    _warn_of_duplicates(classnames, tokens)
    return tokens


def spell_names(classnames: Sequence[str]) -> list[str]:
    """The names as they stand in a prompt: an underscore counts as a space.

    Raises:
        UserError: no classes, or an empty name.
    """
    if isinstance(classnames, str) or not len(classnames):
        raise UserError(f"The class list must be a non-empty list of names, got {classnames!r}.")
    names = [_spell(name) for name in classnames]
    for k, name in enumerate(names):
        if not tokenizer().encode(name):
            raise UserError(f"Class {k} has an empty name; give every class at least one word.")
    return names


def pad_prompts(rows: Sequence[Sequence[int]], names: Sequence[str], context_length: int) -> Tensor:
    """Prompts of K named classes, from SOS to EOT, as one (K, L) int64 tensor padded with 0.

    Raises:
        UserError: a prompt does not fit the context length.
    """
    tokens = torch.zeros(len(rows), context_length, dtype=torch.int64)
    for k, (row, name) in enumerate(zip(rows, names, strict=True)):
        if len(row) > context_length:
            raise UserError(
                f"The prompt of class {k}, '{_shorten(name)}', has {len(row)} tokens "
                f"({len(tokenizer().encode(name))} of them its name), but the model reads {context_length}; "
                "shorten the name or the context."
            )
        tokens[k, : len(row)] = torch.tensor(row)
    return tokens


def warn_of_unknown_words(classnames: Sequence[str], known: frozenset[int]) -> None:
    """Warn of classes whose name has a token that the model was not trained on."""
    unknown = [name for name in classnames if not known.issuperset(tokenizer().encode(_spell(name)))]
    if unknown:
        warnings.warn(
            f"The model never saw the words of {', '.join(repr(_shorten(name)) for name in unknown[:5])}"
            f"{' and others' if len(unknown) > 5 else ''}: what it says of such classes means little.",
            stacklevel=3,
        )


def _spell(name: str) -> str:
    return str(name).replace("_", " ")


def _warn_of_duplicates(classnames: Sequence[str], tokens: Tensor) -> None:
    first: dict[bytes, int] = {}
    pairs = []
    for k, row in enumerate(tokens.numpy()):
        j = first.setdefault(row.tobytes(), k)
        if j != k:
            pairs.append(f"{j} and {k} ('{classnames[k]}')")
    if pairs:
        warnings.warn(
            f"Classes with the same prompt cannot be told apart: {', '.join(pairs[:5])}"
            f"{' and others' if len(pairs) > 5 else ''}. They keep their own labels.",
            stacklevel=3,
        )


def _shorten(name: str, limit: int = 40) -> str:
    return name if len(name) <= limit else f"{name[: limit - 3]}..."
