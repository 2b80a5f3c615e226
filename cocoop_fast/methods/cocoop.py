"""PromptLearner: context vectors and the Meta-Net that shifts them by the image (paper, section 3.2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.config import ClassPosition
from cocoop_fast.errors import UserError
from cocoop_fast.methods.learner import ContextLearner, master_dtype
from cocoop_fast.ops.assemble_prompts import assemble_context_ref, assemble_prompts_ref


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
    reference has them in float16, and its state dicts load); the buffers ``token_prefix`` (K, 1, d) and
    ``token_suffix`` (K, L - 1 - M, d); ``n_cls``, ``n_ctx``, ``tokenized_prompts`` (K, L), ``name_lens``.

    Raises:
        UserError: an empty class list or name, a prompt longer than the context length, or a cfg whose
            image size is not the model's.
    """

    section = "COCOOP"
    token_prefix: Tensor
    token_suffix: Tensor

    def __init__(self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__(cfg, classnames, clip_model)
        weights = self._frozen.text_weights()
        self.meta_net = MetaNet(self._frozen.embed_dim, self._frozen.width)
        self.meta_net.to(weights.device, master_dtype(weights.dtype))
        self._embed_tokens()

    def set_classnames(self, classnames: Sequence[str]) -> None:
        super().set_classnames(classnames)
        self._embed_tokens()

    def contexts(self, image_features: Tensor) -> Tensor:
        """v_m(x) = v_m + h_theta(x): (B, E) unit-length image features to (B, M, d) contexts, of `ctx`'s dtype.

        With class-specific contexts (B, K, M, d): one shift for all of them.
        """
        bias = self.meta_net(image_features.to(self.ctx.dtype))
        if self.ctx.ndim == 3:
            return self.ctx[None] + bias[:, None, None]
        return assemble_context_ref(self.ctx, bias)

    def forward(self, im_features: Tensor) -> Tensor:
        """The reference's output: (B, E) image features to dense prompts (B, K, L, d), of the model's dtype."""
        if self.ctx.ndim == 3 or self._class_position != "end":
            raise UserError(
                "Dense prompts are made for a shared context before the class name only, as in the reference; "
                "use `contexts` and `layout`."
            )
        context = self.contexts(im_features).to(self.token_prefix.dtype)
        return assemble_prompts_ref(context, self.token_prefix, self.token_suffix)

    def _embed_tokens(self) -> None:
        weights = self._frozen.text_weights()
        with torch.no_grad():
            tokens = self.tokenized_prompts.to(weights.device)
            first, rest = tokens[:, :1], tokens[:, 1 + self.n_ctx :]
            prefix, suffix = (weights.token_embedding[part].to(weights.dtype) for part in (first, rest))
        self.register_buffer("token_prefix", prefix)
        self.register_buffer("token_suffix", suffix)


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
