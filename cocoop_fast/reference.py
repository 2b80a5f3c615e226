"""The oracle: dense CoCoOp, CoOp and zero-shot CLIP, straight from the papers' equations.

Every prompt is a full sequence (77 tokens), every image is encoded with all K prompts, one image at a time, by
the CLIP model's own modules. Slow and obvious. Nothing here imports the fast code, which is tested against it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def encode_prompts(clip_model: Any, prompts: Tensor, tokens: Tensor) -> Tensor:
    """(n, L, d) prompt embeddings to (n, E) text features, by the model's own transformer.

    Args:
        clip_model: an open_clip CLIP, or OpenAI's (whose blocks hold the mask and want (L, n, d)).
        prompts: (n, L, d) token embeddings.
        tokens: (n, L) ids; the largest of a row is its EOT.
    """
    dtype = prompts.dtype
    x = prompts + clip_model.positional_embedding.to(dtype)
    if getattr(clip_model, "attn_mask", None) is not None:
        x = clip_model.transformer(x, attn_mask=clip_model.attn_mask)
    else:
        x = clip_model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    x = clip_model.ln_final(x).to(dtype)
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ clip_model.text_projection


class DenseLearner(nn.Module):
    """What is learned: `ctx`, and for CoCoOp the Meta-Net, under the reference's state-dict keys."""

    def __init__(self, ctx: Tensor, embed_dim: int | None) -> None:
        super().__init__()
        self.ctx = nn.Parameter(ctx.clone())
        self.meta_net: nn.Module | None = None
        if embed_dim is not None:
            hidden, width = embed_dim // 16, ctx.shape[1]
            layers = OrderedDict(
                linear1=nn.Linear(embed_dim, hidden), relu=nn.ReLU(), linear2=nn.Linear(hidden, width)
            )
            self.meta_net = nn.Sequential(layers).to(ctx)


class DensePromptedCLIP(nn.Module):
    """Dense CoCoOp (``conditional=True``) or CoOp (``conditional=False``).

    Args:
        clip_model: an open_clip or OpenAI CLIP.
        classnames: K names.
        ctx_init: words of the initial context, one token each; or "" for `n_ctx` random vectors.
        conditional: whether the Meta-Net shifts the context by the image.
    """

    def __init__(
        self,
        clip_model: Any,
        classnames: Sequence[str],
        *,
        ctx_init: str = "a photo of a",
        n_ctx: int = 4,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        self.clip_model: Any = clip_model
        n_ctx = len(ctx_init.split()) if ctx_init else n_ctx
        words = ctx_init or " ".join(["X"] * n_ctx)
        self.tokens = open_clip.tokenize([f"{words} {name.replace('_', ' ')}." for name in classnames])
        dtype = clip_model.ln_final.weight.dtype
        with torch.no_grad():
            self.embedding = clip_model.token_embedding(self.tokens).to(dtype)  # (K, L, d)
        ctx = (
            self.embedding[0, 1 : 1 + n_ctx]
            if ctx_init
            else 0.02 * torch.randn(n_ctx, self.embedding.shape[2])
        )
        embed_dim = clip_model.text_projection.shape[1] if conditional else None
        self.prompt_learner = DenseLearner(ctx.to(dtype), embed_dim)
        self.image_encoder: nn.Module = clip_model.visual
        self.logit_scale: nn.Parameter = clip_model.logit_scale
        self.dtype: torch.dtype = dtype

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) images to the loss in training mode, to logits (B, K) otherwise."""
        return self.forward_features(self.image_encoder(image.to(self.dtype)), label)

    def forward_features(self, image_features: Tensor, label: Tensor | None = None) -> Tensor:
        """The same from image features (B, E)."""
        if self.prompt_learner.training:
            assert label is not None
            return self.loss_and_logits(image_features, label)[0]
        return self.logits(image_features)

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy loss, and the logits (B, K) behind it."""
        logits = self.logits(image_features)
        return F.cross_entropy(logits, label), logits.detach()

    def logits(self, image_features: Tensor) -> Tensor:
        """logit_k(x) = exp(s) cos(f(x), g(t_k(x))), t_k(x) = {v_1(x), .., v_M(x), c_k}, v_m(x) = v_m + h(x)."""
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        ctx = self.prompt_learner.ctx
        n_ctx, rows = len(ctx), []
        for x in image_features:
            meta_net = self.prompt_learner.meta_net
            shifted = ctx if meta_net is None else ctx + meta_net(x)
            prompts = torch.stack([torch.cat([e[:1], shifted, e[1 + n_ctx :]]) for e in self.embedding])
            text = encode_prompts(self.clip_model, prompts, self.tokens)
            text = text / text.norm(dim=-1, keepdim=True)
            rows.append(self.logit_scale.exp() * x @ text.T)
        return torch.stack(rows)


def zero_shot_logits(
    clip_model: Any,
    image_features: Tensor,
    classnames: Sequence[str],
    template: str = "a photo of a {}.",
) -> Tensor:
    """Zero-shot CLIP: (B, E) image features to logits (B, K)."""
    tokens = open_clip.tokenize([template.format(name.replace("_", " ")) for name in classnames])
    text = encode_prompts(clip_model, clip_model.token_embedding(tokens).to(image_features.dtype), tokens)
    text = text / text.norm(dim=-1, keepdim=True)
    image_features = image_features / image_features.norm(dim=-1, keepdim=True)
    return clip_model.logit_scale.exp() * image_features @ text.T
