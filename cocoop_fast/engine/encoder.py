"""CLIP's text transformer, evaluated once per distinct row of the K prompts.

Rows of an image: M context rows, then the N nodes of the class tree (R = M + N). SOS, and whatever else no context
precedes, is a constant of the model and no row at all. What is exact about this, and why, is in docs/design.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel, FrozenCLIP
from cocoop_fast.engine.class_rows import ClassRows
from cocoop_fast.engine.constants import TowerConstants, compute_constants, own_types
from cocoop_fast.engine.contexts import ContextRows, Contexts, ShiftedContext
from cocoop_fast.engine.fused_tower import FusedTower
from cocoop_fast.engine.pieces import MemoryBudget, Tower, encode_in_pieces
from cocoop_fast.engine.torch_tower import TorchTower
from cocoop_fast.errors import UserError
from cocoop_fast.ops.table import Backend, select_backend
from cocoop_fast.prompts.tree import ClassTree


class TreeTextEncoder(nn.Module):
    """Text features of K prompts for B contexts, sharing every row that is shared.

    Args:
        clip_model: an open_clip or OpenAI CLIP whose text tower is causal and EOT-pooled.
        tree: the class tree of the K prompts.
        backend: "auto" or the name of a backend of :mod:`cocoop_fast.ops.table`. Trees of other than the
            standard shape are always computed by "torch"; a warning says so where another backend was named.
        memory_budget: bytes, or text like "256MB", for all that a step allocates above the loaded model. What does
            not fit goes through the tower in pieces, see :mod:`cocoop_fast.engine.pieces`. None: most of what is free.
        text_dtype: what the tower computes in, with copies of its matrices: float16 or bfloat16 for a float32 model. None:
            the model's own.

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
        text_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.frozen = FrozenCLIP(clip_model, text_dtype)
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
        self.backend = self._select_backend()

    @torch.compiler.disable  # its kernels and its memory are its own: there is nothing in it to compile
    def forward(self, ctx: Contexts, deep: Sequence[Tensor] = ()) -> Tensor:
        """Encode the K prompts under each context.

        Args:
            ctx: (M, d) or (B, M, d) context vectors; (K, M, d) or (B, K, M, d) where each class has its own; or the
                two parts of (B, M, d). Differentiable; computed in the dtype of the model.
            deep: up to layers - 1 tensors, each of the shape of `ctx`: what takes the place of the context rows
                at the input of layers 1, 2, ... (MaPLe, section 3.2). Position embeddings are not added to them.

        Returns:
            (B, K, E) text features, not normalised; (K, E) from contexts without B.

        Raises:
            UserError: `ctx` or `deep` has another shape or is not floating point.
        """
        with _outside_inference_mode():
            tower = self.tower
            rows, batched = self._rows(ctx, deep)
            features = encode_in_pieces(tower, rows, self.memory)
            features = tower.constants.classes(features, tower.ops).to(self.frozen.dtype)
        return features if batched else features[0]

    def encode_classes(self, ctx: Contexts, classes: Tensor) -> Tensor:
        """Encode the prompts of some classes alone.

        Args:
            ctx: as in :meth:`forward`.
            classes: (n,) int64.

        Returns:
            (B, n, E) text features, not normalised; (n, E) from contexts without B.
        """
        return self.part(classes)(ctx)

    @torch.no_grad()
    def encode_own_classes(self, ctx: ShiftedContext, classes: Tensor) -> Tensor:
        """Encode, for each image, the prompts of some classes of its own; without gradients.

        Images share the weights and nothing else, not even the tree: each goes through the tower by itself. Rows of a few
        dozen classes already use the products well, and all images in one pass would take 0.88 of the time.

        Args:
            ctx: of B images.
            classes: (B, n) int64.

        Returns:
            (B, n, E) text features, not normalised.
        """
        rows, _ = self._rows(ctx)
        weights = self.frozen.text_weights()
        features = torch.empty(
            *classes.shape, weights.projection.weight.shape[1], dtype=self.frozen.dtype, device=weights.device
        )
        # Where all classes of an image fit, so do some of them, and nobody has to find out again.
        fits = not self.memory.pieces(self.tower, 1, keeps=False).shards
        for i, own in enumerate(classes):
            features[i] = self.part(own).encode(rows.images(slice(i, i + 1)), fits=fits)[0]
        return features

    def part(self, classes: Tensor) -> EncoderPart:
        """:meth:`encode_classes` for the same classes again and again, as long as tree and weights stay.

        Args:
            classes: (n,) int64.
        """
        return EncoderPart(self, classes)

    @property
    def tower(self) -> Tower:
        """What computes now, with its constants; made anew only when a weight was changed or moved."""
        weights = self.frozen.text_weights()
        if self._tower is None or self._tower.constants.weights is not weights:
            self.backend = self._select_backend()
            with torch.no_grad(), own_types(weights.device):
                self._tower = _tower_of(self.backend, compute_constants(weights, self.tree))
        return self._tower

    def lower_memory(self, batch: int) -> None:
        """After a step of B images ran out of memory: see :meth:`MemoryBudget.lower`."""
        self.memory.lower(self.tower, batch)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the tower, whose memory is this encoder's own; it is made anew."""
        return {**self.__dict__, "_tower": None}

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

    def _rows(self, ctx: Contexts, deep: Sequence[Tensor] = ()) -> tuple[ContextRows, bool]:
        """As a tower takes them, and whether `ctx` has a dimension B in front."""
        if isinstance(ctx, ShiftedContext):
            self._check_shifted(ctx)
            if self.tree.is_standard:
                self._check_deep(torch.Size((len(ctx.shift), *ctx.vectors.shape)), deep)
                vectors, shift, *others = map(self._readable, (ctx.vectors, ctx.shift, *deep))
                return ContextRows(vectors, shift, tuple(others)), True
            ctx = ctx.sum()
        own = (self.tree.n_classes,) if self.tree.class_specific else ()
        expected = (*own, self.tree.n_slots, self.frozen.width)
        extra = ctx.ndim - len(expected)
        if extra not in (0, 1) or tuple(ctx.shape[extra:]) != expected or not ctx.is_floating_point():
            names = "K, M, d" if own else "M, d"
            raise UserError(
                f"`ctx` must be a floating-point ({names}) or (B, {names}) tensor with ({names}) = {expected}, "
                f"got {ctx.dtype} of shape {tuple(ctx.shape)}."
            )
        self._check_deep(ctx.shape, deep)
        rows = [one.flatten(-3, -2) if own else one for one in (ctx, *deep)]
        first, *others = (self._readable(one if extra else one[None]) for one in rows)
        return ContextRows(None, first, tuple(others)), extra == 1

    def _readable(self, contexts: Tensor) -> Tensor:
        """In a dtype that the backend reads: float32 parameters of a float16 model stay float32 until they are added up,
        float16 sums that autocast makes for a float32 model do not."""
        return (
            contexts
            if contexts.dtype in self.backend.dtypes
            else contexts.to(self.frozen.text_weights().dtype)
        )

    def _check_shifted(self, ctx: ShiftedContext) -> None:
        m, d = expected = self.tree.n_slots, self.frozen.width
        shift = ctx.shift.shape
        fits = len(shift) in (2, 3) and tuple(shift[1:]) in ((d,), (m, d))
        floats = ctx.vectors.is_floating_point() and ctx.shift.is_floating_point()
        if tuple(ctx.vectors.shape) != expected or not fits or not floats or self.tree.class_specific:
            raise UserError(
                f"A shifted context must have floating-point `vectors` of shape (M, d) = {expected} and a `shift` of "
                f"(B, d) or (B, M, d), and all classes must share it; got {tuple(ctx.vectors.shape)} and "
                f"{tuple(shift)}."
            )

    def _check_deep(self, shape: torch.Size, deep: Sequence[Tensor]) -> None:
        if len(deep) >= self.frozen.layers:
            raise UserError(
                f"`deep` has {len(deep)} prompts, but a text tower of {self.frozen.layers} layers takes at most "
                f"{self.frozen.layers - 1}: its first layer reads `ctx`."
            )
        for layer, prompt in enumerate(deep, start=1):
            if prompt.shape != shape or not prompt.is_floating_point():
                raise UserError(
                    f"The deep prompt of layer {layer} must be floating-point and of the shape of `ctx`, "
                    f"{tuple(shape)}, got {prompt.dtype} of shape {tuple(prompt.shape)}."
                )

    def _select_backend(self) -> Backend:
        weights = self.frozen.text_weights()
        chosen = select_backend(weights.device, weights.dtype, self._explicit_backend)
        return chosen if self.tree.is_standard else select_backend(weights.device, weights.dtype, "torch")


def _tower_of(backend: Backend, constants: TowerConstants) -> Tower:
    return TorchTower(constants) if backend.load is None else FusedTower(constants, backend.load())


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
        tree, whole = encoder.tree, encoder.tower
        leaves, asked = tree.leaf_of_class[classes.cpu()].unique(return_inverse=True)
        nodes = tree.ancestors(tree.leaves[leaves])
        self._encoder, self._whole = encoder, whole
        every = len(leaves) == len(tree.leaves)
        self._tower = whole if every else whole.for_part(whole.constants.part(tree.subtree(nodes)))
        self._asked = ClassRows(asked, whole.constants.weights.device)

    @torch.compiler.disable
    def __call__(self, ctx: Contexts) -> Tensor:
        """As :meth:`TreeTextEncoder.encode_classes`."""
        rows, batched = self._encoder._rows(ctx)
        features = self.encode(rows)
        return features if batched else features[0]

    @torch.compiler.disable
    def encode(self, rows: ContextRows, *, fits: bool = False) -> Tensor:
        """(B, n, E) from contexts as a tower takes them.

        Args:
            rows: of B contexts.
            fits: it is known that they do not have to go through in pieces.
        """
        with _outside_inference_mode():
            if fits or (rows.requires_grad and self._encoder.memory.holds(self._whole, rows.batch)):
                features = self._tower.encode(rows)
            else:
                features = encode_in_pieces(self._tower, rows, self._encoder.memory)
            return self._asked(features, self._tower.ops).to(self._encoder.frozen.dtype)

    def lower_memory(self, batch: int) -> None:
        """As :meth:`TreeTextEncoder.lower_memory`, by the size of this part."""
        self._encoder.memory.lower(self._tower, batch)
