"""What a learner hands to the encoder: context vectors, whole, or as what all images share and the shift of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cocoop_fast.ops.assemble_prompts import assemble_context_ref


@dataclass(frozen=True, eq=False)
class ShiftedContext:
    """v_m(x) = v_m + h_m(x) in its two parts (paper, section 3.2): nobody but the first layer's kernel adds them up.

    Args:
        vectors: (M, d), the same for all images.
        shift: (B, d), the same for all vectors of an image, or (B, M, d).
    """

    vectors: Tensor
    shift: Tensor

    def sum(self) -> Tensor:
        """(B, M, d)."""
        return assemble_context_ref(self.vectors, self.shift)

    def detach(self) -> ShiftedContext:
        return ShiftedContext(self.vectors.detach(), self.shift.detach())


# (M, d) for all images and classes, (B, M, d) for each image; (K, M, d) or (B, K, M, d) where each class has its own.
Contexts: TypeAlias = Tensor | ShiftedContext


def dense_contexts(contexts: Contexts) -> Tensor:
    """The context vectors themselves."""
    return contexts.sum() if isinstance(contexts, ShiftedContext) else contexts


class ContextRows(NamedTuple):
    """Contexts as a tower takes them. S context vectors of a context: M, or K M if each class has its own.

    Args:
        vectors: (M, d), or None.
        shift: what is added to them, (B, M, d) or (B, d); without them the contexts themselves, (B, S, d).
        deep: (B, S, d) each: what takes the place of the context rows at the input of layers 1, 2, ...
    """

    vectors: Tensor | None
    shift: Tensor
    deep: tuple[Tensor, ...] = ()

    @property
    def batch(self) -> int:
        """B."""
        return len(self.shift)

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and any(
            one is not None and one.requires_grad for one in self.tensors()
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, to be put together again by :meth:`of`."""
        return self.vectors, self.shift, *self.deep

    def types(self) -> tuple[tuple[torch.Size, torch.dtype] | None, ...]:
        """Shape and dtype of each of :meth:`tensors`."""
        return tuple(None if one is None else (one.shape, one.dtype) for one in self.tensors())

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> ContextRows:
        vectors, shift, *deep = tensors
        assert shift is not None
        return cls(vectors, shift, tuple(one for one in deep if one is not None))

    def images(self, images: slice) -> ContextRows:
        """Those of some images."""
        return ContextRows(self.vectors, self.shift[images], tuple(one[images] for one in self.deep))

    def sum(self) -> Tensor:
        """(B, S, d)."""
        return self.shift if self.vectors is None else assemble_context_ref(self.vectors, self.shift)
