"""A frozen CLIP that classifies by prompts: what all methods share, and those that learn a context (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cocoop_fast.clip.frozen import ClipModel, FrozenCLIP
from cocoop_fast.engine.encoder import TreeTextEncoder
from cocoop_fast.engine.pruning import Pruned, check_prune_mass, pruned_cross_entropy
from cocoop_fast.errors import UserError
from cocoop_fast.methods.learner import Learner
from cocoop_fast.ops.consistency import Anchor
from cocoop_fast.ops.head import cosine_cross_entropy, cosine_logits_ref
from cocoop_fast.ops.meta_net import unit_rows
from cocoop_fast.prompts.tree import ClassTree


class EngineOptions(TypedDict, total=False):
    """How text is computed: the options of :class:`LearnedPromptCLIP`."""

    backend: str
    memory_budget: int | str | None
    prune_mass: float
    text_dtype: torch.dtype | None


class ImageClassifier(Protocol):
    """What training and evaluation ask of a model: the methods of this package have it, and the dense oracle too.

    Shapes: B images, E embedding, K classes.
    """

    @property
    def prompt_learner(self) -> nn.Module:
        """Its parameters are all that is learned, and its mode is the model's."""

    @property
    def image_encoder(self) -> Any:
        """Images (B, 3, H, W) of dtype ``dtype`` to features (B, E)."""

    @property
    def dtype(self) -> torch.dtype: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def forward_features(self, image_features: Tensor) -> Tensor:
        """(B, E) to logits (B, K), in evaluation mode."""

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E) and (B,) to the scalar loss and the logits (B, K), detached."""


class PromptedCLIP(nn.Module):
    """A frozen CLIP that classifies by the text features of its prompts.

    Subclasses say what the text features are. Only ``prompt_learner`` is meant to be trained, and its mode
    decides what a call returns: the loss in training, the logits in evaluation.

    It freezes ``clip_model`` in place (``requires_grad_(False)``), which the reference leaves to its trainer: the image
    tower then keeps nothing for a backward pass, unless the image asks for a gradient. ``parameters()`` lists CLIP's all
    the same. What is unfrozen *afterwards*, of the image tower or ``logit_scale``, gets gradients; the text tower
    gets none.
    """

    prompt_learner: nn.Module
    pruned: Pruned | None = None  # what the last training step left out of its gradient, if it was asked to

    def __init__(self, clip_model: ClipModel, n_classes: int, *, backend: str = "auto") -> None:
        super().__init__()
        self._frozen = FrozenCLIP(clip_model)
        clip_model.requires_grad_(False)
        self._whole_clip = (clip_model,)  # no submodule of its own: its state is the towers'
        self.backend = backend
        self.n_classes = n_classes
        self.embed_dim = self._frozen.embed_dim
        self.image_encoder: nn.Module = clip_model.visual
        self.logit_scale: nn.Parameter = clip_model.logit_scale

    @property
    def anchor(self) -> Anchor | None:
        """What training keeps text features near; ``None``: nothing."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Of CLIP's arithmetic."""
        return self._frozen.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``to``, ``half``, ``double`` and the like reach all of CLIP, also what is no part of the model."""
        super()._apply(fn, recurse)
        if recurse:
            self._whole_clip[0]._apply(fn)
        return self

    def text_features(self, image_features: Tensor) -> Tensor:
        """(B, E) unit-length image features to text features: (B, K, E), or (1, K, E) if no image matters."""
        raise NotImplementedError

    def set_classnames(self, classnames: Sequence[str]) -> None:
        """Classify into other classes from now on. What was learned stays.

        Raises:
            UserError: an unusable class list, or what was learned belongs to the classes trained on.
        """
        raise NotImplementedError

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Classify images.

        Args:
            image: (B, 3, H, W) floating point, preprocessed; H and W are the model's image size.
            label: (B,) integers, or a list of them; needed in training mode.

        Returns:
            The scalar cross-entropy loss in training mode, else logits (B, K).

        Raises:
            UserError: images of another shape or type, or as :meth:`forward_features`.
        """
        check_images(image, self._frozen.image_size)
        return self.forward_features(self.image_encoder(image.to(self.dtype)), label)

    def forward_features(self, image_features: Tensor, label: Tensor | None = None) -> Tensor:
        """The same from image features (B, E) of any length; they are normalised inside.

        Raises:
            UserError: features of the wrong width or not finite, labels missing or out of range.
        """
        if not self.prompt_learner.training:
            return self.logits(image_features)
        if label is None:
            raise UserError("A label is needed in training mode; pass it, or call eval() to get logits.")
        return self.loss_and_logits(image_features, label)[0]

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The scalar cross-entropy loss, and the logits (B, K) behind it, detached.

        Values are checked where they lie on the CPU. On a GPU the host would have to wait for them: there features
        that are not finite give a loss that is not, and labels out of range are the caller's to prevent.
        """
        label = as_labels(label, image_features)
        image_features = self.checked(image_features, label)
        text_features = self.text_features(image_features)
        return cosine_cross_entropy(
            image_features, text_features, self.logit_scale, label, self.backend, self.anchor
        )

    def logits(self, image_features: Tensor) -> Tensor:
        """Scaled cosines (B, K) of image features (B, E) with the text features of their prompts."""
        return self._logits(self.checked(image_features))

    def _logits(self, image_features: Tensor) -> Tensor:
        """Of :meth:`checked` features."""
        return cosine_logits_ref(image_features, self.text_features(image_features), self.logit_scale)

    def checked(self, image_features: Tensor, label: Tensor | None = None) -> Tensor:
        """Unit-length image features (B, E) of the model's dtype, after a look at them and the labels (B,).

        Raises:
            UserError: see :meth:`forward_features`.
        """
        self.check(image_features, label)
        return unit_rows(image_features.to(self.dtype), self.backend)

    @torch.compiler.disable  # it reads values
    def check(self, image_features: Tensor, label: Tensor | None = None) -> None:
        """Raises a UserError if features or labels are not of this model."""
        shape = shape_of(image_features)
        if not isinstance(image_features, Tensor) or shape[1:] != (self.embed_dim,):
            raise UserError(
                f"`image_features` must be a (B, E) tensor with E = {self.embed_dim}, got {shape}; "
                "encode the images with this model's image encoder."
            )
        # Evaluation may wait for a GPU, unless it is being recorded.
        read = image_features.device.type == "cpu" or not (
            torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing()
        )
        if read and not torch.isfinite(image_features).all():
            bad = int((~torch.isfinite(image_features)).any(dim=1).nonzero()[0])
            raise UserError(f"`image_features` has NaN or infinite values in row {bad}; check that image.")
        if label is None:
            return
        integers = not label.is_floating_point() and label.dtype != torch.bool
        if label.shape != image_features.shape[:1] or not integers:
            raise UserError(
                f"`label` must be ({len(image_features)},) integers, got {label.dtype} of {tuple(label.shape)}."
            )
        if label.device.type == "cpu" and len(label):
            lowest, highest = int(label.min()), int(label.max())
            if lowest < 0 or highest >= self.n_classes:
                raise UserError(
                    f"`label` must lie in 0..{self.n_classes - 1}, got {lowest}..{highest}; "
                    "the labels must index the class list."
                )


def check_images(image: Any, size: int) -> None:
    """Raises a UserError that says what to do if `image` is not (B, 3, size, size) floating point."""
    shape = shape_of(image)
    expected = (3, size, size)
    if not isinstance(image, Tensor):
        remedy = "make it a tensor, preprocessed as this CLIP expects"
    elif shape[1:] == expected and shape[0] and image.is_floating_point():
        return
    elif shape[1:] == expected and shape[0]:
        remedy = "divide bytes by 255 and normalise them as this CLIP expects"
    elif shape == expected:
        remedy = "add the batch, image[None]"
    elif shape[1:] == (size, size, 3):
        remedy = "put the channels first, image.permute(0, 3, 1, 2)"
    else:
        remedy = "preprocess images as this CLIP expects"
    what = f"{image.dtype} of {shape}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
    raise UserError(f"`image` must be a floating-point (B, 3, {size}, {size}) tensor, got {what}; {remedy}.")


def as_labels(label: Any, image_features: Tensor) -> Tensor:
    """Labels as int64 where the features are; what are no integers stays, for a check to refuse.

    Raises:
        UserError: they are no numbers.
    """
    if not isinstance(label, Tensor):
        try:
            label = torch.as_tensor(label, device=image_features.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"`label` must be a tensor or a list of integers, got {label!r}.") from error
    return label if label.is_floating_point() or label.dtype == torch.bool else label.long()


def shape_of(value: Any) -> tuple[int, ...]:
    """Of a tensor or an array; () of anything else."""
    return tuple(getattr(value, "shape", ()))


Made = TypeVar("Made")


class _OfClasses(Generic[Made]):
    """What belongs to the class names there are, made when it is first asked for."""

    def __init__(self, make: Callable[[Sequence[str]], Made], classnames: Sequence[str]) -> None:
        self._make, self._classnames = make, classnames
        self._made: Made | None = None

    def get(self) -> Made:
        if self._made is None:
            self._made = self._make(self._classnames)
        return self._made

    def forget(self, classnames: Sequence[str] | None = None) -> None:
        """It is made again, of other class names if they are given."""
        self._made = None
        if classnames is not None:
            self._classnames = classnames


class LearnedPromptCLIP(PromptedCLIP):
    """A frozen CLIP whose prompts hold a learned context: any method whose learner has the :class:`Learner` interface.

    Args:
        clip_model: an open_clip or OpenAI CLIP with a causal, EOT-pooled text tower.
        learner: what is learned.
        backend: "auto", or a backend of :mod:`cocoop_fast.ops.table`.
        memory_budget: bytes, or text like "256MB", for all that a step allocates above the loaded model; None: most
            of what is free. What does not fit is computed in pieces, with the same result.
        prune_mass: tau: in training, backward leaves out classes that have at most a share tau of the probability
            that the label does not have. 0 is exact; `pruned` says what was left out.
        text_dtype: what the text tower computes in, if not in the model's own dtype.

    Raises:
        UserError: an unsupported model or backend, prompts that do not fit the text tower, or a budget or tau out
            of range.
    """

    prompt_learner: Learner

    def __init__(
        self,
        clip_model: ClipModel,
        learner: Learner,
        *,
        backend: str = "auto",
        memory_budget: int | str | None = None,
        prune_mass: float = 0.0,
        text_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(clip_model, len(learner.layout.symbols), backend=backend)
        self.prompt_learner = learner
        learner.compute_by(backend)
        self.prune_mass = check_prune_mass(prune_mass)
        self._anchor: _OfClasses[Anchor] | None = None
        self._zero_shot: _OfClasses[Tensor] | None = None
        self.tree_encoder = TreeTextEncoder(
            clip_model,
            ClassTree.from_layout(learner.layout),
            backend=backend,
            memory_budget=memory_budget,
            text_dtype=text_dtype,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for one in (self._anchor, self._zero_shot):
            if one is not None:
                one.forget()  # of the CLIP as it was
        return super()._apply(fn, recurse)

    def keep_near(self, anchor_of: Callable[[Sequence[str]], Anchor], classnames: Sequence[str]) -> None:
        """Add a term to the loss that keeps text features near those of hand-written prompts.

        Args:
            anchor_of: those of class names; asked for at the first step with them.
            classnames: those there are now.

        Raises:
            UserError: backward leaves classes out, while the term has all of them.
        """
        if self.prune_mass:
            raise UserError(
                "Pruning leaves classes out of backward, and consistency keeps the text features of all of them near; "
                "use one or the other."
            )
        self._anchor = _OfClasses(anchor_of, classnames)

    def average_with(
        self, text_features_of: Callable[[Sequence[str]], Tensor], classnames: Sequence[str]
    ) -> None:
        """Classify by the mean of these logits and those with other text features. Training is as it was.

        Args:
            text_features_of: to (K, E), of any length, for K class names; asked for at the first evaluation with them.
            classnames: those there are now.
        """
        self._zero_shot = _OfClasses(text_features_of, classnames)

    @property
    def averaged_with(self) -> Tensor | None:
        """(K, E) text features whose logits take part in classification; ``None``: none do."""
        return None if self._zero_shot is None else self._zero_shot.get()

    def averaged(self, logits: Tensor, image_features: Tensor) -> Tensor:
        """The mean of logits (B, K) and those with :attr:`averaged_with`, for unit-length image features (B, E)."""
        other = self.averaged_with
        if other is None:
            return logits
        beside = cosine_logits_ref(image_features, other[None].to(image_features.dtype), self.logit_scale)
        return (logits + beside) / 2

    def _logits(self, image_features: Tensor) -> Tensor:
        return self.averaged(super()._logits(image_features), image_features)

    @property
    def anchor(self) -> Anchor | None:
        """What text features are kept near; ``None``: nothing."""
        return None if self._anchor is None else self._anchor.get()

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        if not (self.prune_mass and torch.is_grad_enabled()):
            return super().loss_and_logits(image_features, label)
        label = as_labels(label, image_features)
        image_features = self.checked(image_features, label)
        contexts = self.prompt_learner.contexts(image_features)
        loss, logits, self.pruned = pruned_cross_entropy(
            self.tree_encoder, contexts, image_features, self.logit_scale, label, self.prune_mass
        )
        return loss, logits

    def lower_memory(self, batch: int) -> None:
        """After a step of B images ran out of memory: from now on smaller pieces.

        Raises:
            UserError: there are none.
        """
        self.tree_encoder.lower_memory(batch)

    def why_not_recorded(self, *, training: bool = True) -> str | None:
        """Why a training step, or evaluating a batch, waits for the device, so that no CUDA graph can be made of it; None if it
        does not."""
        if training and self.prune_mass:
            return "optim.prune_mass chooses the classes of each step by its probabilities"
        if self.tree_encoder.memory.shards(self.tree_encoder.tree):
            return "the classes go through the text tower in shards, for want of memory"
        return None

    def made_of(self) -> tuple[object, ...]:
        """What a recorded graph has of this model, and reads without being told: as long as all of it is the same, a replay is
        what a call would be. Values may change in place."""
        learner = self.prompt_learner
        tensors = *learner.parameters(), *learner.buffers(), self.logit_scale, self.averaged_with
        memory = (None if one is None else (one.data_ptr(), one.shape, one.dtype) for one in tensors)
        return self.tree_encoder.tower, learner.training, *memory

    def text_features(self, image_features: Tensor) -> Tensor:
        features = self.tree_encoder(self.prompt_learner.contexts(image_features))
        return features if features.ndim == 3 else features[None]

    def set_classnames(self, classnames: Sequence[str]) -> None:
        for one in (self._anchor, self._zero_shot):
            if one is not None:
                one.forget(classnames)
        self.prompt_learner.set_classnames(classnames)
        self.tree_encoder.set_tree(ClassTree.from_layout(self.prompt_learner.layout))
        self.n_classes = len(self.prompt_learner.layout.symbols)
