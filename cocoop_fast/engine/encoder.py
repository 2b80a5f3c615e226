"""CLIP's text transformer, evaluated once per distinct row of the K prompts.

Rows of an image: M context rows, then the N nodes of the class tree (R = M + N). SOS, and whatever else no context
precedes, is a constant of the model and no row at all. What is exact about this, and why, is in docs/design.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel, FrozenCLIP, text_module
from cocoop_fast.engine.constants import TowerConstants, compute_constants, finish_block, project, qkv_rows
from cocoop_fast.engine.cpu_tower import CpuTower
from cocoop_fast.engine.gpu_tower import GpuTower, tower_on
from cocoop_fast.engine.pieces import MemoryBudget, encode_in_pieces
from cocoop_fast.engine.torch_tower import TorchTower
from cocoop_fast.errors import UserError
from cocoop_fast.ops.table import Backend, select_backend
from cocoop_fast.prompts.tree import ClassTree

Tower = TorchTower | CpuTower | GpuTower
TOWERS: dict[str, Callable[[TowerConstants], Tower]] = {
    "torch": TorchTower,
    "cpu": CpuTower,
    "triton": partial(tower_on, "triton"),
    "cuda": partial(tower_on, "cuda"),
}


class TreeTextEncoder(nn.Module):
    """Text features of K prompts for B contexts, sharing every row that is shared.

    Args:
        clip_model: an open_clip or OpenAI CLIP whose text tower is causal and EOT-pooled.
        tree: the class tree of the K prompts.
        backend: "auto" or the name of a backend of :mod:`cocoop_fast.ops.table`. Trees of other than the
            standard shape, and deep prompts, are always computed by "torch"; a warning says so where another
            backend was named.
        memory_budget: bytes, or text like "256MB", for all that a step allocates above the loaded model. What does
            not fit goes through the tower in pieces, see :mod:`cocoop_fast.engine.pieces`. None: most of what is free.

    Raises:
        UserError: an unsupported text tower or backend, a tree that does not fit the tower's context length, or a
            budget that is no amount of memory.
    """

    def __init__(
        self,
        clip_model: ClipModel,
        tree: ClassTree,
        *,
        backend: str = "auto",
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__()
        self.frozen = FrozenCLIP(clip_model)
        self.memory = MemoryBudget(memory_budget)
        self._explicit_backend = backend
        self.set_tree(tree)
        if not tree.is_standard and backend not in ("auto", self.backend.name):
            warnings.warn(
                f"The backend '{backend}' computes prompts with one shared context before the class name; "
                "this layout is computed by 'torch'.",
                stacklevel=2,
            )

    def set_tree(self, tree: ClassTree) -> None:
        """Encode the prompts of another tree from now on.

        Raises:
            UserError: it does not fit the tower's context length or vocabulary.
        """
        self._check_tree(tree)
        self.tree = tree
        self._tower: Tower | None = None
        self._deep_tower: TorchTower | None = None  # where the other one cannot take deep prompts
        self.backend = self._select_backend()

    def forward(self, ctx: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Encode the K prompts under each context.

        Args:
            ctx: (M, d) or (B, M, d) context vectors; (K, M, d) or (B, K, M, d) where each class has its own.
                Differentiable; computed in the dtype of the model.
            deep: up to layers - 1 tensors, each of the shape of `ctx`: what takes the place of the context rows
                at the input of layers 1, 2, ... (MaPLe, section 3.2). Position embeddings are not added to them.

        Returns:
            (B, K, E) text features, not normalised; (K, E) from contexts without B.

        Raises:
            UserError: `ctx` or `deep` has another shape or is not floating point.
        """
        batched = self._is_batched(ctx)
        self._check_deep(ctx, deep)
        rows = [one.flatten(-3, -2) if self.tree.class_specific else one for one in (ctx, *deep)]
        rows = rows if batched else [one[None] for one in rows]
        with _outside_inference_mode():
            tower = self._current_tower(deep=bool(deep))
            features = encode_in_pieces(tower, rows, self.memory)[:, tower.constants.leaf_of_class]
        return features if batched else features[0]

    def encode_classes(self, ctx: Tensor, classes: Tensor) -> Tensor:
        """Encode the prompts of some classes alone.

        Args:
            ctx: as in :meth:`forward`.
            classes: (n,) int64.

        Returns:
            (B, n, E) text features, not normalised; (n, E) from contexts without B.
        """
        return self.part(classes)(ctx)

    def part(self, classes: Tensor) -> EncoderPart:
        """:meth:`encode_classes` for the same classes again and again, as long as tree and weights stay.

        Args:
            classes: (n,) int64.
        """
        return EncoderPart(self, classes)

    def lower_memory(self, batch: int) -> None:
        """After a step of B images ran out of memory: see :meth:`MemoryBudget.lower`."""
        self.memory.lower(self._current_tower(deep=False), batch)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the towers, whose memory is this encoder's own; they are made anew."""
        return {**self.__dict__, "_tower": None, "_deep_tower": None}

    def extra_repr(self) -> str:
        return f"{self.tree}, backend={self.backend.name}"

    def _check_tree(self, tree: ClassTree) -> None:
        longest = 1 + tree.n_ctx + tree.max_depth
        if longest > self.frozen.context_length:
            raise UserError(
                f"The longest prompt has {longest} tokens, but the text tower reads {self.frozen.context_length}; "
                "use a shorter context or class name."
            )
        highest = int(torch.cat([tree.token, tree.constants.token]).max())
        if max(highest, tree.sos) >= self.frozen.vocab_size:
            raise UserError(
                f"The prompts use token id {max(highest, tree.sos)}, but the text tower knows "
                f"{self.frozen.vocab_size} tokens; tokenize them with the model's own tokenizer."
            )

    def _is_batched(self, ctx: Tensor) -> bool:
        """Whether `ctx` has a dimension B in front."""
        own = (self.tree.n_classes,) if self.tree.class_specific else ()
        expected = (*own, self.tree.n_slots, self.frozen.width)
        extra = ctx.ndim - len(expected)
        if extra not in (0, 1) or tuple(ctx.shape[extra:]) != expected or not ctx.is_floating_point():
            names = "K, M, d" if own else "M, d"
            raise UserError(
                f"`ctx` must be a floating-point ({names}) or (B, {names}) tensor with ({names}) = {expected}, "
                f"got {ctx.dtype} of shape {tuple(ctx.shape)}."
            )
        return extra == 1

    def _check_deep(self, ctx: Tensor, deep: Sequence[Tensor]) -> None:
        if len(deep) >= self.frozen.layers:
            raise UserError(
                f"`deep` has {len(deep)} prompts, but a text tower of {self.frozen.layers} layers takes at most "
                f"{self.frozen.layers - 1}: its first layer reads `ctx`."
            )
        for layer, prompt in enumerate(deep, start=1):
            if prompt.shape != ctx.shape or not prompt.is_floating_point():
                raise UserError(
                    f"The deep prompt of layer {layer} must be floating-point and of the shape of `ctx`, "
                    f"{tuple(ctx.shape)}, got {prompt.dtype} of shape {tuple(prompt.shape)}."
                )

    def _select_backend(self) -> Backend:
        weights = self.frozen.text_weights()
        chosen = select_backend(weights.device, weights.dtype, self._explicit_backend)
        return chosen if self.tree.is_standard else select_backend(weights.device, weights.dtype, "torch")

    def _current_tower(self, *, deep: bool) -> Tower:
        """The tower that serves, with its constants, made anew only when a weight was changed or moved."""
        weights = self.frozen.text_weights()
        if self._tower is None or self._tower.constants.weights is not weights:
            self.backend = self._select_backend()
            with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
                self._tower = TOWERS[self.backend.name](compute_constants(weights, self.tree))
            self._deep_tower = None
        if not deep or isinstance(self._tower, TorchTower):
            return self._tower
        if self._deep_tower is None:
            self._deep_tower = TorchTower(self._tower.constants)
        return self._deep_tower


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """What a pass keeps (constants, packed weights, buffers) serves training later, which tensors of
    ``torch.inference_mode`` cannot."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class EncoderPart:
    """Some classes of an encoder, see :meth:`TreeTextEncoder.part`."""

    def __init__(self, encoder: TreeTextEncoder, classes: Tensor) -> None:
        tree, whole = encoder.tree, encoder._current_tower(deep=False)
        leaves, asked = tree.leaf_of_class[classes.cpu()].unique(return_inverse=True)
        nodes = tree.ancestors(tree.leaves[leaves])
        self._encoder = encoder
        self._tower = whole.for_part(whole.constants.part(tree.subtree(nodes)))
        self._asked = asked.to(whole.constants.weights.device)

    def __call__(self, ctx: Tensor) -> Tensor:
        """As :meth:`TreeTextEncoder.encode_classes`."""
        batched = self._encoder._is_batched(ctx)
        rows = ctx.flatten(-3, -2) if self._encoder.tree.class_specific else ctx
        with _outside_inference_mode():
            features = encode_in_pieces(self._tower, [rows if batched else rows[None]], self._encoder.memory)
        features = features[:, self._asked]
        return features if batched else features[0]

    def lower_memory(self, batch: int) -> None:
        """As :meth:`TreeTextEncoder.lower_memory`, by the size of this part."""
        self._encoder.memory.lower(self._tower, batch)


class TextEncoder(nn.Module):
    """The reference's dense text encoder: one transformer pass a prompt, here up to the last EOT only.

    Args:
        clip_model: an open_clip or OpenAI CLIP whose text tower is causal and EOT-pooled.
    """

    def __init__(self, clip_model: ClipModel) -> None:
        super().__init__()
        self.frozen = FrozenCLIP(clip_model)
        text = text_module(clip_model)
        self.transformer = text.transformer
        self.positional_embedding = text.positional_embedding
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.dtype

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor) -> Tensor:
        """Encode prompts given as embeddings.

        Args:
            prompts: (n, L, d) token embeddings, context included.
            tokenized_prompts: (n, L) integer ids; each row's largest is its EOT.

        Returns:
            (n, E) text features, not normalised.

        Raises:
            UserError: the shapes do not belong together.
        """
        if prompts.ndim != 3 or tuple(tokenized_prompts.shape) != tuple(prompts.shape[:2]):
            raise UserError(
                f"`prompts` must be (n, L, d) and `tokenized_prompts` (n, L), got {tuple(prompts.shape)} "
                f"and {tuple(tokenized_prompts.shape)}."
            )
        weights = self.frozen.text_weights()
        ends = tokenized_prompts.to(prompts.device).argmax(dim=-1)
        length = int(ends.max()) + 1  # nothing after the last EOT is ever read
        x = prompts[:, :length].to(weights.dtype) + weights.positional_embedding[:length].to(weights.dtype)
        for block in weights.blocks:
            q, k, v = qkv_rows(x, block, weights.heads)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (n, H, L, D)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = finish_block(x, o.transpose(1, 2), block, weights.activation)
        return project(x[torch.arange(len(x), device=x.device), ends], weights)
