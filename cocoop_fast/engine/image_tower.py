"""A frozen ViT by the CPU engine's products: CLIP's image encoder for what asks for no gradient.

Weights are packed once, and products take bias, activation and residual along; images go through all layers a few at a time, so that
what lies between the products stays in the caches; and of the last layer only the class token is computed, which is all that is
read of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoop_fast.clip.frozen import (
    Affine,
    Followed,
    parameters_below,
    read_activation,
    read_block,
    read_layer_norm,
)
from cocoop_fast.errors import UserError
from cocoop_fast.ops import cpu
from cocoop_fast.ops.linear import FrozenLinear
from cocoop_fast.ops.table import select_backend

ROWS_AT_ONCE = 512  # of tokens, or else one image

# Of the largest feature: rounding is a hundred times less, another function much more.
_TOLERANCE = 1e-4

_PARTS = "conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj"

Visual: TypeAlias = Any  # open_clip's or OpenAI's VisionTransformer; they share attributes, but no base class


@dataclass(frozen=True, eq=False)
class _Layer:
    """What one layer multiplies by, and the LayerNorms behind its two halves."""

    in_proj: FrozenLinear  # query, key and value; of the last layer, key and value
    out_proj: FrozenLinear
    ln_2: Affine
    fc: FrozenLinear
    proj: FrozenLinear
    ln_next: Affine


@dataclass(frozen=True, eq=False)
class _Packed:
    """Shapes: T tokens an image, d width, P pixels of a patch's side, E embedding."""

    patches: FrozenLinear  # (d, 3 P P)
    patch_size: int
    class_token: Tensor  # (d,)
    positions: Tensor  # (T, d)
    ln_pre: Affine | None
    ln_first: Affine
    layers: tuple[_Layer, ...]
    last_query: FrozenLinear
    projection: Tensor  # (d, E)
    heads: int
    hidden: int  # width of the MLP
    activation: str


class FrozenViT(nn.Module):
    """CLIP's image tower, the same function up to rounding, for float32 weights on a CPU.

    What asks for a gradient, of an image or of a weight, goes through the tower itself, and so does what is moved to another device
    or number type. Weights that change are packed again. Before it is used it is compared with the tower on a random image.

    Args:
        visual: the ``visual`` of an open_clip or OpenAI model.

    Raises:
        UserError: no ViT that is read at its class token, or one that computes anything else than CLIP's; another device or
            number type; or there is no C++ extension.
    """

    def __init__(self, visual: Visual) -> None:
        super().__init__()
        self.visual = visual
        if reason := _why_not(visual):
            raise _refused(visual, reason)
        weight = visual.conv1.weight
        try:
            select_backend(weight.device, weight.dtype, "cpu")
        except UserError as error:
            raise UserError(f"model.image_backend: {error}") from error
        self._packed = Followed(partial(parameters_below, visual), partial(_pack, visual))
        self._compare()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to features (B, E)."""
        asks = torch.is_grad_enabled() and (
            image.requires_grad or any(p.requires_grad for p in parameters_below(self.visual))
        )
        ours = image.dtype == self.visual.conv1.weight.dtype == torch.float32 and image.device.type == "cpu"
        if asks or not ours or len(image) == 0 or list(image.shape[1:]) != self._image_shape():
            features: Tensor = self.visual(image)
            return features
        with torch.no_grad():
            return self._encode(image)

    def _image_shape(self) -> list[int]:
        patches, size = len(self.visual.positional_embedding) - 1, self.visual.conv1.kernel_size[0]
        side = size * round(patches**0.5)
        return [3, side, side]

    def _encode(self, image: Tensor) -> Tensor:
        weights = self._packed.current()
        at_once = max(1, ROWS_AT_ONCE // len(weights.positions))
        return torch.cat([_class_rows(weights, few) for few in image.split(at_once)]) @ weights.projection

    @torch.no_grad()
    def _compare(self) -> None:
        image = torch.randn(1, *self._image_shape(), generator=torch.Generator().manual_seed(0))
        training = self.visual.training
        expected = self.visual.eval()(image)
        self.visual.train(training)
        off = float((self._encode(image) - expected).abs().max() / expected.abs().max())
        if not off <= _TOLERANCE:
            raise _refused(
                self.visual, f"its features are others than those of CLIP's ViT, by {off:.0e} of the largest"
            )


class _Rows:
    """Memory of n rows on their way through the layers."""

    def __init__(self, n: int, width: int, hidden: int) -> None:
        self.x, self.halfway, self.normed = (padded(n, width) for _ in range(3))
        self.hidden = padded(n, hidden)
        self._statistics = torch.empty(n), torch.empty(n)

    def norm(self, source: Tensor, ln: Affine, out: Tensor) -> None:
        cpu.layer_norm_fwd(source, None, None, ln.weight, ln.bias, ln.eps, out, *self._statistics)

    def finish(self, layer: _Layer, attended: Tensor, activation: str) -> None:
        """From the attention's result (n, d) to the layer's, `x`, and what the next one reads, `normed`."""
        layer.out_proj.forward_norm(
            attended, self.x, self.halfway, layer.ln_2, self.normed, *self._statistics
        )
        layer.fc.forward_activation(self.normed, activation, None, self.hidden)
        layer.proj.forward_norm(
            self.hidden, self.halfway, self.x, layer.ln_next, self.normed, *self._statistics
        )


def padded(n: int, columns: int) -> Tensor:
    """(n, columns), its rows no large power of two apart."""
    return torch.empty(n, columns + cpu.ROW_PADDING)[:, :columns]


def _class_rows(w: _Packed, image: Tensor) -> Tensor:
    """(b, 3, H, W) to (b, d): the class token's rows after the last LayerNorm."""
    (tokens, width), batch = w.positions.shape, len(image)
    rows = _Rows(batch * tokens, width, w.hidden)
    _embed(w, image, rows)
    rows.norm(rows.x, w.ln_first, rows.normed)
    qkv = padded(batch * tokens, 3 * width)
    for layer in w.layers[:-1]:
        layer.in_proj.forward(rows.normed, qkv)
        rows.finish(layer, _attention(*_by_head(qkv, 3, w.heads, batch)), w.activation)

    layer, last = w.layers[-1], _Rows(batch, width, w.hidden)
    keys_and_values, query = qkv[:, : 2 * width], padded(batch, width)
    layer.in_proj.forward(rows.normed, keys_and_values)
    w.last_query.forward(rows.normed[::tokens], query)
    last.x.copy_(rows.x[::tokens])
    attended = _attention(*_by_head(query, 1, w.heads, batch), *_by_head(keys_and_values, 2, w.heads, batch))
    last.finish(layer, attended, w.activation)
    return last.normed


def _embed(w: _Packed, image: Tensor, rows: _Rows) -> None:
    """Patches and class token to `x`."""
    batch, side = len(image), w.patch_size
    grid = image.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (b, 3, rows, P, columns, P)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch * (len(w.positions) - 1), -1)
    embedded = padded(len(patches), w.positions.shape[1])
    w.patches.forward(patches, embedded)
    x = rows.halfway.unflatten(0, (batch, -1))
    x[:, 0] = w.class_token
    x[:, 1:] = embedded.unflatten(0, (batch, -1))
    x += w.positions
    if w.ln_pre is None:
        rows.x.copy_(rows.halfway)
    else:
        rows.norm(rows.halfway, w.ln_pre, rows.x)


def _by_head(rows: Tensor, parts: int, heads: int, batch: int) -> tuple[Tensor, ...]:
    """(b t, parts d) to parts of (b, heads, t, d / heads), without a copy."""
    return rows.unflatten(1, (parts, heads, -1)).unflatten(0, (batch, -1)).permute(2, 0, 3, 1, 4).unbind()


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """To (b t, d), t queries an image."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1)


def _pack(visual: Visual) -> _Packed:
    conv, blocks = visual.conv1, [read_block(block) for block in visual.transformer.resblocks]
    width = conv.out_channels
    bias = conv.weight.new_zeros(width) if conv.bias is None else conv.bias
    norms = [*(block.ln_1 for block in blocks[1:]), read_layer_norm(visual.ln_post)]

    def linear(weight: Tensor, bias: Tensor) -> FrozenLinear:
        return cpu.frozen_linear(Affine(weight.detach(), bias.detach()), packed=True)

    def part(affine: Affine, rows: slice) -> FrozenLinear:
        return linear(affine.weight[rows], affine.bias[rows])

    layers = []
    for number, (block, ln_next) in enumerate(zip(blocks, norms, strict=True)):
        read = slice(width, None) if number == len(blocks) - 1 else slice(None)
        layers.append(
            _Layer(
                in_proj=part(block.in_proj, read),
                out_proj=part(block.out_proj, slice(None)),
                ln_2=block.ln_2,
                fc=part(block.fc, slice(None)),
                proj=part(block.proj, slice(None)),
                ln_next=ln_next,
            )
        )
    return _Packed(
        patches=linear(conv.weight.flatten(1), bias),
        patch_size=conv.kernel_size[0],
        class_token=visual.class_embedding.detach(),
        positions=visual.positional_embedding.detach(),
        ln_pre=read_layer_norm(visual.ln_pre) if isinstance(visual.ln_pre, nn.LayerNorm) else None,
        ln_first=blocks[0].ln_1,
        layers=tuple(layers),
        last_query=part(blocks[-1].in_proj, slice(width)),
        projection=visual.proj.detach(),
        heads=visual.transformer.resblocks[0].attn.num_heads,
        hidden=blocks[0].fc.weight.shape[0],
        activation=read_activation(visual.transformer.resblocks[0].mlp.gelu),
    )


def _why_not(visual: Visual) -> str | None:
    """Why its weights cannot be read as those of CLIP's ViT; None: they can."""
    for name in _PARTS:
        if getattr(visual, name, None) is None:
            return f"it has no `{name}`"
    if getattr(visual, "attn_pool", None) is not None or getattr(visual, "pool_type", "tok") != "tok":
        return "it is not read at its class token"
    if getattr(visual, "output_tokens", False):
        return "it returns tokens beside the features"
    for block in visual.transformer.resblocks:
        parts = dict(block.named_children())
        ours = isinstance(parts.get("attn"), nn.MultiheadAttention) and "mlp" in parts
        if not ours or {name for name, _ in parts["mlp"].named_children()} != {"c_fc", "gelu", "c_proj"}:
            return f"it has blocks of type {type(block).__name__}, which are not CLIP's"
    return None


def _refused(visual: Visual, reason: str) -> UserError:
    return UserError(
        f"model.image_backend cpu computes CLIP's ViT, but this {type(visual).__name__} is none: {reason}; leave it at torch."
    )
