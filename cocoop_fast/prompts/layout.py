"""What a prompt is made of: constant words, learnable context and the class name, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

import torch
from torch import Tensor

from cocoop_fast.clip.tokenizer import encode
from cocoop_fast.config import ClassPosition
from cocoop_fast.errors import UserError
from cocoop_fast.prompts.tokens import TokenizedPrompts, pad_prompts, spell_names


@dataclass(frozen=True)
class Context:
    """`length` learnable context vectors in a row."""

    length: int


class ClassName(Enum):
    """The place of the class name; there is one value, ``CLASS_NAME``."""

    CLASS_NAME = "class name"


CLASS_NAME = ClassName.CLASS_NAME
Segment = str | Context | ClassName


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """K prompts whose learnable tokens may be anywhere after SOS.

    Args:
        symbols: (K, L) int64. A token id, or ``-1 - s`` where the s-th learnable context vector goes: SOS, the
            prompt, EOT (the largest of a row), padding with 0. Every row has the slots 0 .. M - 1, in this order.
        n_slots: M, the number of context vectors of a prompt.
        class_specific: whether each class has context vectors of its own, (K, M, d), or all share (M, d).
    """

    symbols: Tensor
    n_slots: int
    class_specific: bool = False


def layout_at(
    prompts: TokenizedPrompts, position: ClassPosition = "end", *, class_specific: bool = False
) -> PromptLayout:
    """The reference's CoOp prompts: the class name after, amid or before the M context vectors.

    As there, the prompt is tokenized with the name at the end, and the tokens that are the name are then moved:
    "middle" puts M // 2 context vectors before the name and the rest after it. The full stop stays at the end.

    Args:
        prompts: "<context> <name>." tokenized. With attributes all tokens before the name are slots, the attributes' own
            too, so that the tree has the standard shape that every backend computes.
        position: where the name goes.
        class_specific: as in :class:`PromptLayout`.

    Raises:
        UserError: attributes in prompts whose name is not at the end, or with a context for each class.
    """
    if prompts.attributes and (position != "end" or class_specific):
        raise UserError(
            "Attributes stand before a context that all classes share, with the class name at its end (ATPrompt); leave out "
            f"{'csc' if class_specific else f'the class position {position}'}, or the attributes."
        )
    m, symbols = prompts.n_before_name, prompts.tokens.clone()
    symbols[:, 1 : 1 + m] = -1 - torch.arange(m)
    ahead = {"end": m, "middle": m // 2, "front": 0}[position]
    column = torch.arange(symbols.shape[1])
    is_name = (column > m) & (column <= m + torch.tensor(prompts.name_lens)[:, None])
    order = torch.where(is_name, ahead + 0.5, column).argsort(dim=1, stable=True)
    return PromptLayout(symbols.gather(1, order), m, class_specific)


def layout_of_segments(
    classnames: Sequence[str],
    segments: Sequence[Segment],
    *,
    class_specific: bool = False,
    context_length: int = 77,
) -> PromptLayout:
    """Prompts from segments, e.g. ``["a ", CLASS_NAME, " with", Context(4), "."]``.

    Text and class name between two contexts are joined as they are written, spaces included, and tokenized
    together; an underscore in a name counts as a space.

    Args:
        classnames: K names.
        segments: at least one `Context` and one `CLASS_NAME`.
        class_specific: as in :class:`PromptLayout`.
        context_length: L.

    Raises:
        UserError: an unusable class list or layout, or a prompt longer than the context length.
    """
    contexts = [segment.length for segment in segments if isinstance(segment, Context)]
    if not contexts or min(contexts) < 1:
        raise UserError("A prompt layout needs a learnable context of at least one vector: add `Context(n)`.")
    if CLASS_NAME not in segments:
        raise UserError("A prompt layout needs the class name: add `CLASS_NAME`.")
    names = spell_names(classnames)
    prompts = []
    for name in names:
        symbols: list[int] = []
        slots, text = iter(range(-1, -1 - sum(contexts), -1)), ""
        for segment in segments:
            if isinstance(segment, Context):
                symbols += [*encode(text), *islice(slots, segment.length)]
                text = ""
            else:
                text += name if segment is CLASS_NAME else str(segment)
        prompts.append([*symbols, *encode(text)])
    return PromptLayout(pad_prompts(prompts, names, context_length), sum(contexts), class_specific)
