"""PromptLearner: context vectors and the Meta-Net that shifts them by the image (paper, section 3.2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cocoop_fast.clip import ClipModel, FrozenCLIP
from cocoop_fast.errors import UserError
from cocoop_fast.ops.assemble_prompts import assemble_context_ref, assemble_prompts_ref
from cocoop_fast.prompt_tokens import tokenize_prompts

_PRECISION_OF_META_NET = {"fp16": torch.float16, "bf16": torch.bfloat16}


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


class PromptLearner(nn.Module):
    """Drop-in for the reference's ``trainers.cocoop.PromptLearner``.

    Args:
        cfg: any object with ``TRAINER.COCOOP.N_CTX``, ``.CTX_INIT``, ``.PREC`` and ``INPUT.SIZE``.
        classnames: K names; an underscore counts as a space.
        clip_model: an open_clip or OpenAI CLIP.

    Attributes: ``ctx`` (M, d) and ``meta_net``, the parameters; the buffers ``token_prefix`` (K, 1, d) and
    ``token_suffix`` (K, L - 1 - M, d); ``n_cls``, ``n_ctx``, ``tokenized_prompts`` (K, L), ``name_lens``.

    Raises:
        UserError: an empty class list or name, a prompt longer than the context length, or a cfg whose
            image size is not the model's.
    """

    token_prefix: Tensor
    token_suffix: Tensor

    def __init__(self, cfg: Any, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__()
        frozen = FrozenCLIP(clip_model)
        options = cfg.TRAINER.COCOOP
        _check_image_size(cfg, frozen)
        weights = frozen.text_weights()
        prompts = tokenize_prompts(
            classnames, ctx_init=options.CTX_INIT, n_ctx=options.N_CTX, context_length=frozen.context_length
        )
        self.n_cls, self.n_ctx = len(prompts.name_lens), prompts.n_ctx
        self.tokenized_prompts = prompts.tokens
        self.name_lens = prompts.name_lens

        with torch.no_grad():
            embedding = weights.token_embedding[prompts.tokens.to(weights.device)].to(
                weights.dtype
            )  # (K, L, d)
        if options.CTX_INIT:
            ctx = embedding[0, 1 : 1 + self.n_ctx].clone()
        else:  # drawn on the CPU in float32, so that a seed means the same context on every device
            ctx = nn.init.normal_(torch.empty(self.n_ctx, frozen.width), std=0.02).to(embedding)
        self.ctx = nn.Parameter(ctx)
        self.meta_net = MetaNet(frozen.embed_dim, frozen.width)
        self.meta_net.to(device=weights.device, dtype=_PRECISION_OF_META_NET.get(options.PREC))
        if weights.dtype == torch.float64:
            self.meta_net.double()
        self.register_buffer("token_prefix", embedding[:, :1].clone())
        self.register_buffer("token_suffix", embedding[:, 1 + self.n_ctx :].clone())

    def contexts(self, im_features: Tensor) -> Tensor:
        """v_m(x) = v_m + h_theta(x): (B, E) unit-length image features to (B, M, d) contexts."""
        return assemble_context_ref(self.ctx, self.meta_net(im_features))

    def forward(self, im_features: Tensor) -> Tensor:
        """The reference's output: (B, E) image features to dense prompts (B, K, L, d)."""
        return assemble_prompts_ref(self.contexts(im_features), self.token_prefix, self.token_suffix)


def reference_cfg(*, ctx_init: str, n_ctx: int, precision: str, image_size: int) -> SimpleNamespace:
    """A cfg of the reference's form, for those who have none."""
    options = SimpleNamespace(N_CTX=n_ctx, CTX_INIT=ctx_init, PREC=precision)
    return SimpleNamespace(
        TRAINER=SimpleNamespace(COCOOP=options), INPUT=SimpleNamespace(SIZE=(image_size, image_size))
    )


def _check_image_size(cfg: Any, frozen: FrozenCLIP) -> None:
    size = cfg.INPUT.SIZE[0]
    if size != frozen.image_size:
        raise UserError(f"cfg.INPUT.SIZE is {size} pixels, but the image tower expects {frozen.image_size}.")
