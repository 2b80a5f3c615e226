"""FrozenCLIP: one read-only view over the CLIP models that open_clip and OpenAI's package build.

Nothing here changes a weight, a mode or a gradient flag of the model it looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cocoop_fast.errors import UserError

# An open_clip `CLIP` or `CustomTextCLIP`, or OpenAI's `clip.model.CLIP`. They share attributes, but no base class:
# what is needed of them is checked when a FrozenCLIP looks at one.
ClipModel: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class _Weights:
    """The base of dataclasses that hold tensors, each other, and numbers."""

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """A copy on a device, or of a dtype."""

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            return value.to(device, dtype) if isinstance(value, (Tensor, _Weights)) else value

        return type(self)(**{one.name: moved(getattr(self, one.name)) for one in fields(self)})

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        for one in fields(self):
            value = getattr(self, one.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    yield part
                elif isinstance(part, _Weights):
                    yield from part.tensors()


@dataclass(frozen=True, eq=False)
class Affine(_Weights):
    """Weight and bias of a linear layer, (out, in) and (out,), or of a LayerNorm, (d,) and (d,)."""

    weight: Tensor
    bias: Tensor
    eps: float = 0.0  # LayerNorm only


@dataclass(frozen=True, eq=False)
class TransformerBlock(_Weights):
    """Weights of one pre-norm transformer block: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    ln_1: Affine
    in_proj: Affine  # (3d, d): query, key and value stacked
    out_proj: Affine  # (d, d)
    ln_2: Affine
    fc: Affine  # (4d, d)
    proj: Affine  # (d, 4d)


@dataclass(frozen=True, eq=False)
class TextWeights(_Weights):
    """Detached tensors of a causal, EOT-pooled text transformer. They share the model's storage.

    Shapes: V vocabulary, L context length, d width, E embedding.
    """

    token_embedding: Tensor  # (V, d)
    positional_embedding: Tensor  # (L, d)
    blocks: tuple[TransformerBlock, ...]
    ln_final: Affine
    projection: Affine  # weight (d, E), applied as `x @ weight`; bias (E,), zero in most models
    heads: int
    activation: str  # "quick_gelu" or "gelu"
    copied_bytes: int = 0  # of them are no storage of the model's

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the transformer computes in (embeddings and LayerNorms may be wider)."""
        return self.blocks[0].in_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.blocks[0].in_proj.weight.device

    def in_dtype(self, dtype: torch.dtype) -> TextWeights:
        """With copies of the matrices in another dtype; embeddings and LayerNorms stay as they are."""

        def cast(layer: Affine) -> Affine:
            return layer.to(layer.weight.device, dtype)

        blocks = tuple(
            replace(one, **{name: cast(getattr(one, name)) for name in ("in_proj", "out_proj", "fc", "proj")})
            for one in self.blocks
        )
        weights = replace(self, blocks=blocks, projection=cast(self.projection))
        own = {one.data_ptr() for one in self.tensors()}
        copied = sum(one.nbytes for one in weights.tensors() if one.data_ptr() not in own)
        return replace(weights, copied_bytes=copied)

    @property
    def width(self) -> int:
        return self.positional_embedding.shape[1]

    def versions(self) -> list[int]:
        """Of each tensor how often it was changed in place, as autograd counts (not through `.data`)."""
        return [version_of(one) for one in self._tensors]

    def check_unchanged(self, versions: list[int]) -> None:
        """Between a forward pass and its backward, as autograd does for what it saves.

        Args:
            versions: when the forward pass went through them.

        Raises:
            RuntimeError: a weight was changed in place since.
        """
        if self.versions() != versions:
            raise RuntimeError(
                "A weight of the text tower that the gradient needs was changed in place after the forward pass; "
                "call backward first."
            )

    @cached_property
    def _tensors(self) -> list[Tensor]:
        return list(self.tensors())


def version_of(tensor: Tensor) -> int:
    """What autograd counts; an inference tensor cannot be changed outside of inference mode and has none."""
    return 0 if tensor.is_inference() else tensor._version


_SAMPLED = 4  # elements of a tensor

W = TypeVar("W")


class Followed(Generic[W]):
    """What is read of a model's parameters, and read again when they have changed.

    Args:
        parameters: all that decides.
        read: from them.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]], read: Callable[[], W]) -> None:
        self._parameters, self._read_them = parameters, read
        self._last: tuple[W, list[tuple[int, int]], list[Tensor], Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: it is read again, of the copied model."""
        return {**self.__dict__, "_last": None}

    def current(self) -> W:
        """The same object until a parameter is moved, cast, loaded or modified in place. In place through `.data`, which
        autograd does not count, it is noticed on a CPU by a few elements of each tensor.
        """
        versions = [(p.data_ptr(), version_of(p)) for p in self._parameters()]
        if self._last is not None:
            value, read_at, samples, values = self._last
            if read_at == versions and (values is None or torch.equal(torch.cat(samples), values)):
                return value
        samples = _samples(self._parameters())
        value = self._read_them()
        self._last = value, versions, samples, torch.cat(samples) if samples else None
        return value


def _samples(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Views of a few elements of each, where looking at them makes nobody wait."""
    here = [p.detach() for p in parameters if p.device.type == "cpu" and p.is_contiguous()]
    return [p.view(-1)[:: max(1, p.numel() // _SAMPLED)] for p in here]


# What is read of a block. Forks keep their deep prompts beside these, which change at every step.
_PARTS_OF_BLOCK = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")


class FrozenCLIP:
    """Read-only view of a CLIP model: text weights by role, sizes, and what the tower is able to do.

    Args:
        clip_model: an open_clip ``CLIP`` or ``CustomTextCLIP`` with a ``TextTransformer``, or OpenAI's
            ``clip.model.CLIP``.
        text_dtype: what the text tower computes in, with copies of its matrices; None: the model's own.

    Raises:
        UserError: the text tower is not causal, not pooled at EOT, or of a kind that is not CLIP's; or images are
            not square.
    """

    def __init__(self, clip_model: ClipModel, text_dtype: torch.dtype | None = None) -> None:
        self._text = text_module(clip_model)
        self._text_dtype = text_dtype
        _check_supported(clip_model, self._text)
        self._resblocks = tuple(self._text.transformer.resblocks)
        self._text_weights = Followed(self._parameters, self._read_weights)
        self.heads: int = self._resblocks[0].attn.num_heads
        self.layers = len(self._resblocks)
        self.activation = read_activation(self._resblocks[0].mlp.gelu)
        self.context_length = int(self._text.positional_embedding.shape[0])
        self.width = int(self._text.positional_embedding.shape[1])
        self.vocab_size: int = self._text.token_embedding.weight.shape[0]
        self.embed_dim: int = _projection(self._text).weight.shape[1]
        self.image_size = _image_size(clip_model.visual)

    @property
    def dtype(self) -> torch.dtype:
        return self._resblocks[0].attn.in_proj_weight.dtype

    @property
    def device(self) -> torch.device:
        return self._resblocks[0].attn.in_proj_weight.device

    def embedded(self, tokens: Tensor) -> Tensor:
        """(n, d) embeddings of (n,) tokens on the model's device, in the dtype that the transformer computes in."""
        return self._text.token_embedding.weight.detach()[tokens].to(self.dtype)

    def text_weights(self) -> TextWeights:
        """The current weights, by role: see :meth:`Followed.current`."""
        return self._text_weights.current()

    def _parameters(self) -> Iterator[Tensor]:
        yield self._text.positional_embedding
        parts = (getattr(block, name, None) for block in self._resblocks for name in _PARTS_OF_BLOCK)
        for module in (self._text.token_embedding, self._text.ln_final, *parts):
            if isinstance(module, nn.Module):  # OpenAI's blocks have no LayerScale
                yield from parameters_below(module)
        projection = self._text.text_projection
        yield from parameters_below(projection) if isinstance(projection, nn.Module) else (projection,)

    def _read_weights(self) -> TextWeights:
        text = self._text
        weights = TextWeights(
            token_embedding=text.token_embedding.weight.detach(),
            positional_embedding=text.positional_embedding.detach(),
            blocks=tuple(read_block(block) for block in self._resblocks),
            ln_final=read_layer_norm(text.ln_final),
            projection=_projection(text),
            heads=self.heads,
            activation=self.activation,
        )
        return weights if self._text_dtype in (None, weights.dtype) else weights.in_dtype(self._text_dtype)


def parameters_below(module: nn.Module) -> list[Tensor]:
    """As ``module.parameters()``, which takes the host a millisecond a tower: every pass asks."""
    found: list[Tensor] = [one for one in module._parameters.values() if one is not None]
    for child in module._modules.values():
        if child is not None:
            found += parameters_below(child)
    return found


def text_module(clip_model: ClipModel) -> Any:
    """The module that holds the text tower: the model itself, or open_clip's ``CustomTextCLIP.text``."""
    return clip_model.text if isinstance(getattr(clip_model, "text", None), nn.Module) else clip_model


def _check_supported(clip_model: ClipModel, text: Any) -> None:
    kind = type(clip_model).__name__
    for name in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
        if getattr(text, name, None) is None:
            raise UserError(
                f"The text tower of {kind} has no `{name}`, so it is not CLIP's text transformer; "
                "use a CLIP model of open_clip or OpenAI."
            )
    pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "argmax")
    if pool not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
        raise UserError(
            f"The text tower of {kind} pools by '{pool if pool not in ('argmax', 'eos') else 'cls'}', but "
            "prompts are read at their end-of-text token; use a CLIP model whose text tower is EOT-pooled."
        )
    mask = getattr(text, "attn_mask", None)
    blocks: Sequence[Any] = getattr(text.transformer, "resblocks", ())
    if mask is None and len(blocks):
        mask = getattr(blocks[0], "attn_mask", None)  # OpenAI keeps it in each block
    if mask is None or not _is_causal(mask):
        raise UserError(
            f"The text tower of {kind} is not causal, so its rows cannot be shared between prompts; "
            "use a CLIP model with a causal text mask."
        )
    for block in blocks:
        attention = getattr(block, "attn", None)
        if not isinstance(attention, nn.MultiheadAttention) or not hasattr(block.mlp, "gelu"):
            raise UserError(
                f"The text tower of {kind} has blocks of type {type(block).__name__}, which are not CLIP's "
                "pre-norm attention blocks; use a standard CLIP text tower."
            )


def _is_causal(mask: Tensor) -> bool:
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    blocked = mask if mask.dtype == torch.bool else torch.isneginf(mask)
    return bool((blocked == above).all())


def read_activation(module: nn.Module) -> str:
    """ "quick_gelu" or "gelu".

    Raises:
        UserError: neither.
    """
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return "gelu"
    raise UserError(
        f"The activation {module!r} is not supported; use a CLIP model with QuickGELU or exact GELU."
    )


def read_layer_norm(module: nn.LayerNorm) -> Affine:
    return Affine(module.weight.detach(), module.bias.detach(), module.eps)


def _linear(module: nn.Linear, scale: Any = None) -> Affine:
    weight, bias = module.weight.detach(), module.bias.detach()
    gamma = getattr(scale, "gamma", None)  # open_clip's LayerScale: gamma * (W x + b) = (gamma W) x + gamma b
    if gamma is not None:
        weight, bias = gamma.detach()[:, None] * weight, gamma.detach() * bias
    return Affine(weight, bias)


def read_block(block: Any) -> TransformerBlock:
    return TransformerBlock(
        ln_1=read_layer_norm(block.ln_1),
        in_proj=Affine(block.attn.in_proj_weight.detach(), block.attn.in_proj_bias.detach()),
        out_proj=_linear(block.attn.out_proj, getattr(block, "ls_1", None)),
        ln_2=read_layer_norm(block.ln_2),
        fc=_linear(block.mlp.c_fc),
        proj=_linear(block.mlp.c_proj, getattr(block, "ls_2", None)),
    )


def _projection(text: Any) -> Affine:
    projection = text.text_projection
    linear = isinstance(projection, nn.Linear)
    weight = projection.weight.detach().T if linear else projection.detach()
    if linear and projection.bias is not None:
        return Affine(weight, projection.bias.detach())
    return Affine(weight, weight.new_zeros(weight.shape[1]))


def _image_size(visual: Any) -> int:
    size: Any = getattr(visual, "image_size", None) or getattr(visual, "input_resolution", 224)
    if not isinstance(size, (tuple, list)):
        return int(size)
    if len(set(size)) > 1:
        raise UserError(
            f"The image tower takes {size[0]} x {size[1]} pixels; only square images are supported."
        )
    return int(size[0])
