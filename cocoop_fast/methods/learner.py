"""What a method learns: a module that maps image features to contexts, in prompts of one layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel, FrozenCLIP
from cocoop_fast.config import ClassPosition, as_words
from cocoop_fast.engine.contexts import Contexts, ShiftedContext
from cocoop_fast.errors import UserError
from cocoop_fast.prompts.layout import PromptLayout, layout_at
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.prompts.tree import ClassTree
from cocoop_fast.readable import html_table


class Learner(nn.Module):
    """The interface between a method and the engine, :class:`cocoop_fast.methods.base.LearnedPromptCLIP`.

    Its parameters are all that is learned. B images, K classes, M context vectors of width d, E embedding.
    """

    layout: PromptLayout  # the prompts of the K classes

    def contexts(self, image_features: Tensor) -> Contexts:
        """(B, E) unit-length image features to context vectors.

        Returns:
            (M, d) for all images and classes, (B, M, d) for each image; with a class-specific layout (K, M, d)
            or (B, K, M, d). Where they are vectors (M, d) that all images share plus a shift of each image, (B, d) or
            (B, M, d), the two parts: the first layer's kernel adds them up.
        """
        raise NotImplementedError

    def compute_by(self, backend: str) -> None:
        """What it computes is computed by a backend of :mod:`cocoop_fast.ops.table`, or "auto", where there is a choice."""

    def set_classnames(self, classnames: Sequence[str]) -> None:
        """Make :attr:`layout` that of other classes. What was learned stays.

        Raises:
            UserError: an unusable class list, or one that does not fit what was learned.
        """
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """What a notebook shows: what is learned, and the tree of the prompts it is learned in."""
        rows = [
            [name, str(tuple(one.shape)), f"{one.numel():,}", f"{one.detach().float().norm():.3f}"]
            for name, one in self.named_parameters()
        ]
        table = html_table(["Parameter", "Shape", "Numbers", "Norm"], rows)
        total = sum(one.numel() for one in self.parameters())
        tree = ClassTree.from_layout(self.layout)
        return f"<p>{type(self).__name__}: {total:,} learned numbers.</p>{table}{tree._repr_html_()}"


def _words(ctx_init: Any) -> str:
    """CTX_INIT, which some forks of the reference keep a bool in: False for random vectors."""
    if ctx_init is None or ctx_init is False:
        return ""
    if not isinstance(ctx_init, str):
        raise UserError(
            f"CTX_INIT is {ctx_init!r}, but the words that the context begins as are wanted, e.g. 'a photo of a'. (Forks "
            "that keep True there mean a template of their own: write its words.)"
        )
    return ctx_init


class ContextLearner(Learner):
    """M context vectors in the prompts of K classes: all that CoOp learns. The base of those that learn more.

    Args:
        cfg: any object, or nested dicts, with ``INPUT.SIZE`` and, in ``TRAINER.<section>``, ``N_CTX`` and ``CTX_INIT``
            (words, or "" or False for random vectors). If there, ``CSC`` (a context for each class),
            ``CLASS_TOKEN_POSITION`` ("end", "middle", "front"), ``ABLATE_IMAGE`` (what shifts the context is shown the
            same random vector for every image) and ``ATTRIBUTES`` are read: words, each after M learned vectors of its own,
            which stand before the context and are not shifted (Li et al., ATPrompt, ICCV 2025).
        classnames: K names; an underscore counts as a space.
        clip_model: an open_clip or OpenAI CLIP.

    Attributes: the parameter ``ctx``, (M, d) or (K, M, d) if each class has its own, in float32 for a float16 or
    bfloat16 model too, and ``ctx_att1``, ``ctx_att2``, ..., (M, d) each, before the attributes; ``classnames``, ``n_cls``,
    ``n_ctx``, ``attributes``, ``tokenized_prompts`` (K, L), ``name_lens`` and ``layout``. ``token_prefix`` (K, 1, d) and
    ``token_suffix`` (K, L - 1 - M, d), which the reference keeps as buffers, are made when they are asked for.

    Raises:
        UserError: a cfg without one of these, a CTX_INIT that is no text, an empty class list, name or attribute, a prompt
            longer than the context length, class-specific contexts that are to begin from words, attributes with such
            contexts or another class position than "end", or a cfg whose image size is not the model's.
    """

    _stand_in: Tensor | None
    _attribute_tokens: Tensor
    section = "COOP"
    saves_tokens = (
        False  # `token_prefix` and `token_suffix` in state dicts; they are loaded without them, too
    )

    def __init__(self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__()
        self._frozen = FrozenCLIP(clip_model)
        options = f"TRAINER.{self.section}"
        self._ctx_init = _words(_option(cfg, f"{options}.CTX_INIT"))
        self._class_specific = bool(_option(cfg, f"{options}.CSC", False))
        self._class_position: ClassPosition = _option(cfg, f"{options}.CLASS_TOKEN_POSITION", "end")
        self.attributes: tuple[str, ...] = tuple(as_words(_option(cfg, f"{options}.ATTRIBUTES", ())))
        drawn = None
        if _option(cfg, f"{options}.ABLATE_IMAGE", False):
            drawn = torch.randn(self._frozen.embed_dim, generator=torch.Generator().manual_seed(0))
            drawn /= drawn.norm()
        self.register_buffer("_stand_in", drawn, persistent=False)
        size = _option(cfg, "INPUT.SIZE")
        self._check_options(size if isinstance(size, int) else size[0])
        self.n_ctx: int = _option(cfg, f"{options}.N_CTX")
        self._read(classnames)
        self.ctx = nn.Parameter(self._first_context())
        for name in self._attribute_contexts():
            first = nn.init.normal_(torch.empty(self.n_ctx, self._frozen.width), std=0.01)
            self.register_parameter(name, nn.Parameter(first.to(self.ctx)))

    def contexts(self, image_features: Tensor) -> Contexts:
        """v_m(x) = v_m + h_m(x), in these two parts; with class-specific contexts the sum, (B, K, M, d).

        With attributes, (M', d) for all M' rows before the class name; the words among them are CLIP's embeddings, and only
        the last M are shifted.
        """
        return self.shifted(self.vectors(), image_features)

    def vectors(self) -> Tensor:
        """What all images share: ``ctx``; with attributes, (M', d), what stands before it as well."""
        return torch.cat([*self._ahead(), self.ctx]) if self.attributes else self.ctx

    def shifted(self, vectors: Tensor, image_features: Tensor) -> Contexts:
        """:meth:`contexts` from these vectors."""
        shift = self.shift(self.readable(image_features))
        if shift is None:
            return vectors
        if self.attributes:
            own = shift if shift.ndim == 3 else shift[:, None].expand(-1, self.n_ctx, -1)
            return ShiftedContext(vectors, F.pad(own, (0, 0, len(vectors) - self.n_ctx, 0)))
        if not self._class_specific:
            return ShiftedContext(vectors, shift)
        return vectors + (shift[:, None] if shift.ndim == 3 else shift[:, None, None])

    def _ahead(self) -> Iterator[Tensor]:
        """The learned vectors before each attribute, (M, d), and its own, in turn."""
        words = self._frozen.embedded(self._attribute_tokens).to(self.ctx.dtype)
        for name, word in zip(self._attribute_contexts(), words.split(self._attribute_lens), strict=True):
            yield getattr(self, name)
            yield word

    def _attribute_contexts(self) -> list[str]:
        """The names of ATPrompt's own state dicts."""
        return [f"ctx_att{n}" for n in range(1, 1 + len(self.attributes))]

    def readable(self, image_features: Tensor) -> Tensor:
        """(B, E) features as :meth:`shift` takes them: in the dtype of what is learned."""
        return image_features.to(self.ctx.dtype)

    def shift(self, image_features: Tensor) -> Tensor | None:
        """h_m(x): from (B, E) features to (B, d), or (B, M, d) where each vector has its own; None: there is none."""
        return None

    def seen(self, image_features: Tensor) -> Tensor:
        """(B, E) what the shift is made of: the image features, or in their place the same unit vector for all images."""
        if self._stand_in is None:
            return image_features
        return self._stand_in.to(image_features).expand_as(image_features)

    def set_classnames(self, classnames: Sequence[str]) -> None:
        if self._class_specific and len(classnames) != self.n_cls:
            raise UserError(
                f"Each of the {self.n_cls} classes has a context of its own, so it cannot be told what those of "
                f"{len(classnames)} classes would be; train with a context that all classes share (no csc)."
            )
        self._read(classnames)

    def options(self) -> dict[str, Any]:
        """What it was made with, by the names of :class:`cocoop_fast.config.PromptConfig`."""
        return {
            "ctx_init": self._ctx_init,
            "n_ctx": self.n_ctx,
            "csc": self._class_specific,
            "class_position": self._class_position,
            "attributes": self.attributes,
            "ablate_image": self._stand_in is not None,
        }

    def _read(self, classnames: Sequence[str]) -> None:
        prompts = tokenize_prompts(
            classnames,
            ctx_init=self._ctx_init,
            n_ctx=self.n_ctx,
            attributes=self.attributes,
            context_length=self._frozen.context_length,
        )
        self.n_cls, self.n_ctx = len(prompts.name_lens), prompts.n_ctx
        self.tokenized_prompts, self.name_lens = prompts.tokens, prompts.name_lens
        self._attribute_lens = [len(word) for word in prompts.attributes]
        tokens = torch.tensor(sum(prompts.attributes, ()), dtype=torch.int64)
        self.register_buffer("_attribute_tokens", tokens.to(self._frozen.device), persistent=False)
        self.classnames = tuple(classnames)
        self.layout = layout_at(prompts, self._class_position, class_specific=self._class_specific)

    def _first_context(self) -> Tensor:
        weights = self._frozen.text_weights()
        if self._ctx_init:
            before_name = self.tokenized_prompts[0, 1 : 1 + self.layout.n_slots]
            words = before_name[-self.n_ctx :].to(weights.device)
            # Through the model's own type, as in the reference: its values are then those of the model's words.
            ctx = weights.token_embedding[words].to(weights.dtype)
        else:  # drawn on the CPU in float32, so that a seed means the same context on every device
            classes = (self.n_cls,) if self._class_specific else ()
            ctx = nn.init.normal_(torch.empty(*classes, self.n_ctx, self._frozen.width), std=0.02)
        # A training step is far smaller than what float16 or bfloat16 can add to a number of usual size.
        return ctx.to(weights.device, torch.promote_types(weights.dtype, torch.float32), copy=True)

    def _check_options(self, image_size: int) -> None:
        if image_size != self._frozen.image_size:
            raise UserError(
                f"cfg.INPUT.SIZE is {image_size} pixels, but the image tower expects {self._frozen.image_size}."
            )
        if self._class_position not in get_args(ClassPosition):
            raise UserError(
                f"The class position is {self._class_position!r}; choose end, middle or front of the context."
            )
        if self._class_specific and self._ctx_init:
            raise UserError(
                f"Class-specific contexts begin from random vectors, not from '{self._ctx_init}'; give an empty "
                "ctx_init, or let all classes share the context (no csc)."
            )

    @property
    def token_prefix(self) -> Tensor:
        """(K, 1, d) embeddings of the start-of-text token."""
        return self._embedded(slice(0, 1))

    @property
    def token_suffix(self) -> Tensor:
        """(K, L - 1 - M, d) embeddings of the class names, full stop, end-of-text token and padding."""
        return self._embedded(slice(1 + self.layout.n_slots, None))

    @torch.no_grad()
    def _embedded(self, places: slice) -> Tensor:
        weights = self._frozen.text_weights()
        tokens = self.tokenized_prompts[:, places].to(weights.device)
        return weights.token_embedding[tokens].to(weights.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.saves_tokens:
            destination[f"{prefix}token_prefix"] = self.token_prefix
            destination[f"{prefix}token_suffix"] = self.token_suffix

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Constants of CLIP and the class names are not loaded; but they should be the same."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        _, unexpected, errors = lists
        for name in ("token_prefix", "token_suffix"):
            key, here = prefix + name, getattr(self, name)
            if key not in state_dict:
                continue
            if key in unexpected:
                unexpected.remove(key)
            there = state_dict[key]
            if there.shape != here.shape:
                errors.append(
                    f"`{name}` is of other classes or another context: {tuple(there.shape)} there, "
                    f"{tuple(here.shape)} here."
                )
            elif not torch.allclose(there.to(here), here, rtol=1e-2, atol=1e-3):
                warnings.warn(
                    f"The state dict's `{name}` is of other class names or another CLIP; this learner's own are kept.",
                    stacklevel=2,
                )


def _option(cfg: Any, path: str, *default: Any) -> Any:
    """What a cfg says, as attributes or as keys of dicts.

    Raises:
        UserError: nothing, and there is no default.
    """
    value = cfg
    for name in path.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif hasattr(value, name):
            value = getattr(value, name)
        elif default:
            return default[0]
        else:
            raise UserError(
                f"The cfg, a {type(cfg).__name__}, has no {path}; give the reference's cfg, nested dicts with its keys, "
                "or what cocoop_fast.methods.cocoop.reference_cfg makes."
            )
    return value
