"""CoCoOp: context vectors and the Meta-Net that shifts them by the image (paper, section 3.2).

`PromptLearner`, `TextEncoder` and `CustomCLIP` are drop-ins for the reference's classes of these names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from cocoop_fast.clip.frozen import ClipModel, FrozenCLIP, text_module
from cocoop_fast.config import ClassPosition
from cocoop_fast.engine.constants import finish_block, project, qkv_rows
from cocoop_fast.engine.contexts import dense_contexts
from cocoop_fast.errors import UserError
from cocoop_fast.methods.base import EngineOptions
from cocoop_fast.methods.coop import CoOp
from cocoop_fast.methods.learner import ContextLearner
from cocoop_fast.ops.assemble_prompts import assemble_dense_ref
from cocoop_fast.ops.meta_net import meta_net
from cocoop_fast.ops.table import select_backend


class MetaNet(nn.Sequential):
    """h_theta: Linear(E, E/16), ReLU, Linear(E/16, d). Keys `linear1.*`, `linear2.*` as in the reference.

    Args:
        embed_dim: E, the width of an image feature.
        width: d, the width of a context vector.

    Attributes:
        backend: what computes it, see :func:`cocoop_fast.ops.meta_net.meta_net`. Layers that were replaced or have hooks
            are called one after the other, as those of any ``nn.Sequential``.
    """

    linear1: nn.Linear
    linear2: nn.Linear

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
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """(B, E) of any float dtype to (B, d) in that of the weights."""
        if not self._as_made():
            return super().forward(x.to(next(self.parameters()).dtype))
        one, two = self.linear1, self.linear2
        return meta_net(x, one.weight, one.bias, two.weight, two.bias, self.backend)

    def _as_made(self) -> bool:
        """Whether its layers are those of the paper, and nobody listens to them."""
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        layers = list(self)
        own = [type(one) for one in layers] == [nn.Linear, nn.ReLU, nn.Linear]
        listened_to = any(getattr(one, name) for one in layers for name in hooks)
        return own and not listened_to and None not in (self.linear1.bias, self.linear2.bias)


class PromptLearner(ContextLearner):
    """Drop-in for the reference's ``trainers.cocoop.PromptLearner``: a :class:`ContextLearner` with a Meta-Net.

    Its options are in ``cfg.TRAINER.COCOOP``. Its state dict has the reference's format, with ``meta_net``. (The
    reference has the parameters in float16 for a float16 model; its state dicts load.)

    Raises:
        UserError: as :class:`ContextLearner`, or image features too short for a Meta-Net.
    """

    section = "COCOOP"
    saves_tokens = True

    def __init__(self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__(cfg, classnames, clip_model)
        self.meta_net = MetaNet(self._frozen.embed_dim, self._frozen.width).to(self.ctx)

    def compute_by(self, backend: str) -> None:
        self.meta_net.backend = backend

    def readable(self, image_features: Tensor) -> Tensor:
        """In their own dtype where the Meta-Net reads it, which saves a launch."""
        reads = isinstance(self.meta_net, MetaNet) and self._stand_in is None
        return image_features if reads else super().readable(image_features)

    def shift(self, image_features: Tensor) -> Tensor:
        """h_theta(x): (B, E) to (B, d), the same for all context vectors."""
        return self.meta_net(self.seen(image_features))

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
        k, length, d = len(prefix), 1 + context.shape[1] + suffix.shape[1], prefix.shape[1]
        prompts = prefix.new_empty(len(context), k, length, d)
        load().assemble_dense(context.contiguous(), prefix.contiguous(), suffix.contiguous(), prompts)
        return prompts


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


class CustomCLIP(CoOp):
    """CoCoOp. Drop-in for the reference's ``trainers.cocoop.CustomCLIP``.

    Args:
        cfg: see :class:`PromptLearner`.
        classnames: K class names.
        clip_model: an open_clip or OpenAI CLIP with a causal, EOT-pooled text tower.
        engine: backend, memory_budget, prune_mass and text_dtype of :class:`LearnedPromptCLIP`.

    Raises:
        UserError: an unsupported model, class list or backend, or a budget or tau out of range.
    """

    learner = PromptLearner
    prompt_learner: PromptLearner

    def __init__(
        self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel, **engine: Unpack[EngineOptions]
    ) -> None:
        super().__init__(cfg, classnames, clip_model, **engine)
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
    attributes: Sequence[str] = (),
    ablate_image: bool = False,
) -> SimpleNamespace:
    """A cfg of the reference's form, for those who have none."""
    options = SimpleNamespace(
        N_CTX=n_ctx,
        CTX_INIT=ctx_init,
        PREC=precision,
        CSC=csc,
        CLASS_TOKEN_POSITION=class_position,
        ATTRIBUTES=tuple(attributes),
        ABLATE_IMAGE=ablate_image,
    )
    return SimpleNamespace(
        TRAINER=SimpleNamespace(COCOOP=options, COOP=options),
        INPUT=SimpleNamespace(SIZE=(image_size, image_size)),
    )
