"""CoCoOp: context vectors and the Meta-Net that shifts them by the image (paper, section 3.2).

`PromptLearner`, `TextEncoder` and `CustomCLIP` are drop-ins for the reference's classes of these names.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel, FrozenCLIP, text_module
from cocoop_fast.config import ClassPosition
from cocoop_fast.engine.constants import finish_block, project, qkv_rows
from cocoop_fast.engine.contexts import Contexts, ShiftedContext, dense_contexts
from cocoop_fast.errors import UserError
from cocoop_fast.methods.base import LearnedPromptCLIP
from cocoop_fast.methods.learner import ContextLearner, master_dtype
from cocoop_fast.ops.assemble_prompts import assemble_dense_ref
from cocoop_fast.ops.table import select_backend


class MetaNet(nn.Sequential):
    """h_theta: Linear(E, E/16), ReLU, Linear(E/16, d). Keys `linear1.*`, `linear2.*` as in the reference.

    Args:
        embed_dim: E, the width of an image feature.
        width: d, the width of a context vector.
    """

    def __init__(self, embed_dim: int, width: int) -> None:
        hidden = embed_dim // 16
        if hidden < 1:
            raise UserError(
                f"The Meta-Net needs image features of at least 16 dimensions, this model has {embed_dim}."
            )
        layers = OrderedDict(
            linear1=nn.Linear(embed_dim, hidden), relu=nn.ReLU(inplace=True), linear2=nn.Linear(hidden, width)
        )
        super().__init__(layers)


class PromptLearner(ContextLearner):
    """Drop-in for the reference's ``trainers.cocoop.PromptLearner``.

    Args:
        cfg: any object with ``TRAINER.COCOOP.N_CTX``, ``.CTX_INIT`` and ``INPUT.SIZE``.
        classnames: K names; an underscore counts as a space.
        clip_model: an open_clip or OpenAI CLIP.

    Attributes: ``ctx`` (M, d) and ``meta_net``, the parameters, in float32 for a float16 or bfloat16 model too (the
    reference has them in float16, and its state dicts load); ``n_cls``, ``n_ctx``, ``tokenized_prompts`` (K, L),
    ``name_lens``. ``token_prefix`` (K, 1, d) and ``token_suffix`` (K, L - 1 - M, d), which the reference keeps as
    buffers, are made when they are asked for; state dicts have them, and are loaded with or without them.

    Raises:
        UserError: an empty class list or name, a prompt longer than the context length, or a cfg whose
            image size is not the model's.
    """

    section = "COCOOP"

    def __init__(self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__(cfg, classnames, clip_model)
        weights = self._frozen.text_weights()
        self.meta_net = MetaNet(self._frozen.embed_dim, self._frozen.width)
        self.meta_net.to(weights.device, master_dtype(weights.dtype))

    def contexts(self, image_features: Tensor) -> Contexts:
        """v_m(x) = v_m + h_theta(x): from (B, E) unit-length image features, in parts.

        With class-specific contexts the sum, (B, K, M, d): one shift for all of them.
        """
        shift = self.meta_net(image_features.to(self.ctx.dtype))
        return self.ctx + shift[:, None, None] if self.ctx.ndim == 3 else ShiftedContext(self.ctx, shift)

    def forward(self, im_features: Tensor) -> Tensor:
        """The reference's output: (B, E) image features to dense prompts (B, K, L, d), of the model's dtype."""
        if self.ctx.ndim == 3 or self._class_position != "end":
            raise UserError(
                "Dense prompts are made for a shared context before the class name only, as in the reference; "
                "use `contexts` and `layout`."
            )
        prefix, suffix = self.token_prefix[:, 0], self.token_suffix
        context = dense_contexts(self.contexts(im_features)).to(prefix.dtype)
        load = select_backend(prefix.device, prefix.dtype).load
        if load is None or context.requires_grad:  # the operation has no backward
            return assemble_dense_ref(context, prefix, suffix)
        k, length, d = len(prefix), 1 + self.n_ctx + suffix.shape[1], prefix.shape[1]
        prompts = prefix.new_empty(len(context), k, length, d)
        load().assemble_dense(context.contiguous(), prefix.contiguous(), suffix.contiguous(), prompts)
        return prompts

    @property
    def token_prefix(self) -> Tensor:
        """(K, 1, d) embeddings of the start-of-text token."""
        return self._embedded(slice(0, 1))

    @property
    def token_suffix(self) -> Tensor:
        """(K, L - 1 - M, d) embeddings of the class names, full stop, end-of-text token and padding."""
        return self._embedded(slice(1 + self.n_ctx, None))

    @torch.no_grad()
    def _embedded(self, places: slice) -> Tensor:
        weights = self._frozen.text_weights()
        tokens = self.tokenized_prompts[:, places].to(weights.device)
        return weights.token_embedding[tokens].to(weights.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}token_prefix"] = self.token_prefix
        destination[f"{prefix}token_suffix"] = self.token_suffix

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        _, unexpected, errors = lists
        for name in ("token_prefix", "token_suffix"):
            key = prefix + name
            if key in unexpected:
                unexpected.remove(key)
            if key in state_dict:
                self._compare(name, state_dict[key], errors)

    def _compare(self, name: str, there: Tensor, errors: list[str]) -> None:
        """Constants of CLIP and the class names are not loaded; but they should be the same."""
        here: Tensor = getattr(self, name)
        if there.shape != here.shape:
            errors.append(
                f"`{name}` is of other classes or another context: {tuple(there.shape)} there, {tuple(here.shape)} here."
            )
        elif not torch.allclose(there.to(here), here, rtol=1e-2, atol=1e-3):
            warnings.warn(
                f"The state dict's `{name}` is of other class names or another CLIP; this learner's own are kept.",
                stacklevel=2,
            )


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


class CustomCLIP(LearnedPromptCLIP):
    """CoCoOp. Drop-in for the reference's ``trainers.cocoop.CustomCLIP``.

    Args:
        cfg: see :class:`PromptLearner`.
        classnames: K class names.
        clip_model: an open_clip or OpenAI CLIP with a causal, EOT-pooled text tower.
        backend, memory_budget, prune_mass: see :class:`LearnedPromptCLIP`.

    Raises:
        UserError: an unsupported model, class list or backend, or a budget or tau out of range.
    """

    prompt_learner: PromptLearner

    def __init__(
        self,
        cfg: Any,
        classnames: Sequence[str],
        clip_model: ClipModel,
        *,
        backend: str = "auto",
        memory_budget: int | str | None = None,
        prune_mass: float = 0.0,
    ) -> None:
        super().__init__(
            clip_model,
            PromptLearner(cfg, classnames, clip_model),
            backend=backend,
            memory_budget=memory_budget,
            prune_mass=prune_mass,
        )
        self.text_encoder = TextEncoder(clip_model)

    @property
    def tokenized_prompts(self) -> Tensor:
        """(K, L) token ids, as the reference has them."""
        return self.prompt_learner.tokenized_prompts


def reference_cfg(
    *,
    ctx_init: str,
    n_ctx: int,
    precision: str,
    image_size: int,
    csc: bool = False,
    class_position: ClassPosition = "end",
) -> SimpleNamespace:
    """A cfg of the reference's form, for those who have none."""
    options = SimpleNamespace(
        N_CTX=n_ctx, CTX_INIT=ctx_init, PREC=precision, CSC=csc, CLASS_TOKEN_POSITION=class_position
    )
    return SimpleNamespace(
        TRAINER=SimpleNamespace(COCOOP=options, COOP=options),
        INPUT=SimpleNamespace(SIZE=(image_size, image_size)),
    )
