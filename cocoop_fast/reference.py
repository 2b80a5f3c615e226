"""The oracle: dense CoCoOp, CoOp and zero-shot CLIP, straight from the papers' equations.

Every prompt is a full sequence (77 tokens), every image is encoded with all K prompts, one image at a time, by
the CLIP model's own modules. Slow and obvious. Nothing here imports the fast code, which is tested against it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prompt_names(classnames: Sequence[str]) -> list[str]:
    """Class names as they enter a prompt: an underscore is a space."""
    return [name.replace("_", " ") for name in classnames]


def _tokens(clip_model: Any, prompts: list[str]) -> Tensor:
    """(n, L) ids of n prompts, where the model's embedding is."""
    ids: Tensor = open_clip.tokenize(prompts)
    return ids.to(clip_model.token_embedding.weight.device)


def encode_prompts(
    clip_model: Any,
    prompts: Tensor,
    tokens: Tensor,
    deep: Sequence[Tensor] = (),
    places: Tensor | None = None,
) -> Tensor:
    """(n, L, d) prompt embeddings to (n, E) text features, by the model's own transformer.

    Args:
        clip_model: an open_clip CLIP, or OpenAI's (whose blocks hold the mask and want (L, n, d)).
        prompts: (n, L, d) token embeddings.
        tokens: (n, L) ids; the largest of a row is its EOT.
        deep: (n, M, d) each: the rows that replace those at `places` at the input of layers 1, 2, ...
        places: (n, M) positions of the context in each prompt; needed with `deep`.
    """
    dtype = prompts.dtype
    x = prompts + clip_model.positional_embedding.to(dtype)
    mask = getattr(clip_model, "attn_mask", None)
    arguments = {} if mask is None else {"attn_mask": mask}
    batch_first = getattr(clip_model.transformer, "batch_first", False)
    for layer, block in enumerate(clip_model.transformer.resblocks):
        if 1 <= layer <= len(deep):
            assert places is not None
            x = x.scatter(1, places[:, :, None].expand_as(deep[layer - 1]), deep[layer - 1])
        if batch_first:
            x = block(x, **arguments)
        else:
            x = block(x.permute(1, 0, 2), **arguments).permute(1, 0, 2)
    x = clip_model.ln_final(x).to(dtype)
    return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)] @ clip_model.text_projection


def place_contexts(embedding: Tensor, ctx: Tensor, name_lens: Sequence[int], position: str) -> Tensor:
    """Prompts with the class name after ("end"), amid ("middle") or before ("front") the context.

    Args:
        embedding: (K, L, d) of "<M placeholders> <name>." with SOS, EOT and padding.
        ctx: (K, M, d).
        name_lens: tokens of each name.
        position: where the name goes.

    Returns:
        (K, L, d).
    """
    m, prompts = ctx.shape[1], []
    ahead = {"end": m, "middle": m // 2, "front": 0}[position]
    for e, own, length in zip(embedding, ctx, name_lens, strict=True):
        sos, name, rest = e[:1], e[1 + m : 1 + m + length], e[1 + m + length :]
        prompts.append(torch.cat([sos, own[:ahead], name, own[ahead:], rest]))
    return torch.stack(prompts)


def context_places(n_ctx: int, name_lens: Sequence[int], position: str) -> Tensor:
    """(K, M) positions of the context vectors in the prompts of :func:`place_contexts`."""
    marks = torch.arange(1.0, n_ctx + 1).expand(len(name_lens), -1)[..., None]
    length = 1 + n_ctx + max(name_lens)
    marked = place_contexts(torch.zeros(len(name_lens), length, 1), marks, name_lens, position)[..., 0]
    return marked.nonzero()[:, 1].view(-1, n_ctx)


def meta_net(embed_dim: int, width: int) -> nn.Sequential:
    """h_theta: Linear, ReLU, Linear (paper, section 3.2)."""
    hidden = embed_dim // 16
    layers = OrderedDict(
        linear1=nn.Linear(embed_dim, hidden), relu=nn.ReLU(), linear2=nn.Linear(hidden, width)
    )
    return nn.Sequential(layers)


class DenseLearner(nn.Module):
    """What is learned: `ctx`, and for CoCoOp the Meta-Net, under the reference's state-dict keys.

    Args:
        ctx: (M, d), or (K, M, d) if each class has its own.
        embed_dim: E, the width of the Meta-Net's input; None: there is none.
        nets: 1, or M Meta-Nets, each of which shifts one context vector.
        attributes: (n, d) embeddings of each word that M more learned vectors, `ctx_att1` and so on, stand before.
    """

    def __init__(
        self, ctx: Tensor, embed_dim: int | None, nets: int = 1, attributes: Sequence[Tensor] = ()
    ) -> None:
        super().__init__()
        self.ctx = nn.Parameter(ctx.clone())
        for n, word in enumerate(attributes, start=1):
            self.register_buffer(f"attribute{n}", word, persistent=False)
            self.register_parameter(f"ctx_att{n}", nn.Parameter(0.01 * torch.randn_like(ctx)))
        self.n_attributes = len(attributes)
        if embed_dim is not None and nets == 1:
            self.meta_net = meta_net(embed_dim, ctx.shape[-1]).to(ctx)
        elif embed_dim is not None:
            self.meta_nets = nn.ModuleList(meta_net(embed_dim, ctx.shape[-1]) for _ in range(nets)).to(ctx)

    def context(self, x: Tensor) -> Tensor:
        """The context of one image feature (E,): all that stands between SOS and the class name, if that is at the end."""
        ahead = [
            part for n in range(1, 1 + self.n_attributes)
            for part in (getattr(self, f"ctx_att{n}"), getattr(self, f"attribute{n}"))
        ]  # fmt: skip
        if hasattr(self, "meta_net"):
            own = self.ctx + self.meta_net(x)
        elif hasattr(self, "meta_nets"):
            own = self.ctx + torch.stack([h(x) for h in self.meta_nets])
        else:
            own = self.ctx
        return torch.cat([*ahead, own]) if ahead else own


@dataclass(frozen=True)
class DenseConsistency:
    """What keeps text features g near those of hand-written prompts, g0: text_weight d(g, g0) + logit_weight times the mean
    over classes of softmax(z0) (log softmax(z0) - log softmax(z)).

    Args:
        features: (K, E) g0, of unit length.
        distance: "l1", the mean of ``|g - g0|`` (PromptSRC); or "cosine", that of 1 - g . g0 (KgCoOp).
        text_weight, logit_weight: of the two terms.
    """

    features: Tensor
    distance: str
    text_weight: float
    logit_weight: float

    def loss(self, x: Tensor, text: Tensor, logits: Tensor, scale: Tensor) -> Tensor:
        """Of one image: x (E,) and text (K, E) of unit length, logits (K,)."""
        if self.distance == "l1":
            distance = (text - self.features).abs().mean()
        else:
            distance = (1 - (text * self.features).sum(dim=-1)).mean()
        told = (scale * x @ self.features.T).log_softmax(dim=-1)
        divergence = (told.exp() * (told - logits.log_softmax(dim=-1))).mean()
        return self.text_weight * distance + self.logit_weight * divergence


class DensePromptedCLIP(nn.Module):
    """Dense CoCoOp (``conditional=True``) or CoOp (``conditional=False``).

    Args:
        clip_model: an open_clip or OpenAI CLIP.
        classnames: K names.
        ctx_init: words of the initial context, one token each; or "" for `n_ctx` random vectors.
        conditional: whether the Meta-Net shifts the context by the image.
        meta_nets: one Meta-Net for each context vector instead of one for all.
        class_specific: a context for each class (random).
        class_position: "end", "middle" or "front".
        attributes: words that stand before the context, each after M learned vectors of its own (ATPrompt, ICCV 2025):
            [SOS] [M] color [M] shape [M, shifted by the image] name "." [EOT]. For `class_position` "end".
    """

    def __init__(
        self,
        clip_model: Any,
        classnames: Sequence[str],
        *,
        ctx_init: str = "a photo of a",
        n_ctx: int = 4,
        conditional: bool = True,
        meta_nets: bool = False,
        class_specific: bool = False,
        class_position: str = "end",
        attributes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.clip_model: Any = clip_model
        n_ctx = len(ctx_init.split()) if ctx_init else n_ctx
        words = ctx_init or " ".join(["X"] * n_ctx)
        names = prompt_names(classnames)
        ahead = "".join(f"{'X ' * n_ctx}{attribute} " for attribute in attributes)
        self.tokens = _tokens(clip_model, [f"{ahead}{words} {name}." for name in names])
        self.name_lens = [int(row.argmax()) - 1 for row in open_clip.tokenize(names)]
        self.class_position = class_position
        dtype = clip_model.ln_final.weight.dtype
        with torch.no_grad():
            self.embedding = clip_model.token_embedding(self.tokens).to(dtype)  # (K, L, d)
        of_attributes = []
        first = 1  # of the placeholders that come next
        for attribute in attributes:
            length = int(open_clip.tokenize([attribute]).argmax()) - 1
            of_attributes.append(self.embedding[0, first + n_ctx : first + n_ctx + length])
            first += n_ctx + length
        if ctx_init:
            ctx = self.embedding[0, first : first + n_ctx]
        else:
            classes = (len(names),) if class_specific else ()
            ctx = 0.02 * torch.randn(*classes, n_ctx, self.embedding.shape[2])
        embed_dim = clip_model.text_projection.shape[1] if conditional else None
        nets = n_ctx if meta_nets else 1
        self.prompt_learner = DenseLearner(ctx.to(self.embedding), embed_dim, nets, of_attributes)
        self.consistency: DenseConsistency | None = None
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
        """The cross-entropy loss, with the consistency if there is one, and the logits (B, K) behind it."""
        unit = image_features / image_features.norm(dim=-1, keepdim=True)
        scale = self.logit_scale.exp()
        texts = [self.text(x) for x in unit]
        logits = torch.stack([scale * x @ text.T for x, text in zip(unit, texts, strict=True)])
        loss = F.cross_entropy(logits, label)
        if self.consistency is not None:
            near = [self.consistency.loss(*one, scale) for one in zip(unit, texts, logits, strict=True)]
            loss = loss + torch.stack(near).mean()
        return loss, logits.detach()

    def logits(self, image_features: Tensor) -> Tensor:
        """logit_k(x) = exp(s) cos(f(x), g(t_k(x))), t_k(x) = {v_1(x), .., v_M(x), c_k}, v_m(x) = v_m + h(x)."""
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        return torch.stack([self.logit_scale.exp() * x @ self.text(x).T for x in image_features])

    def text(self, x: Tensor) -> Tensor:
        """The text features (K, E), of unit length, of one image feature (E,)."""
        ctx = self.prompt_learner.context(x).expand(len(self.tokens), -1, -1)
        prompts = place_contexts(self.embedding, ctx, self.name_lens, self.class_position)
        text = encode_prompts(self.clip_model, prompts, self.tokens)
        return text / text.norm(dim=-1, keepdim=True)


@torch.no_grad()
def ensemble_features(clip_model: Any, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The normalised mean (K, E) of the unit text features of hand-written prompts, a class at a time."""
    features = []
    for name in prompt_names(classnames):
        tokens = _tokens(clip_model, [template.format(name) for template in templates])
        prompts = clip_model.token_embedding(tokens).to(clip_model.ln_final.weight.dtype)
        text = encode_prompts(clip_model, prompts, tokens)
        features.append((text / text.norm(dim=-1, keepdim=True)).mean(dim=0))
    mean = torch.stack(features)
    return mean / mean.norm(dim=-1, keepdim=True)


def zero_shot_logits(
    clip_model: Any,
    image_features: Tensor,
    classnames: Sequence[str],
    template: str = "a photo of a {}.",
) -> Tensor:
    """Zero-shot CLIP: (B, E) image features to logits (B, K)."""
    tokens = _tokens(clip_model, [template.format(name) for name in prompt_names(classnames)])
    text = encode_prompts(clip_model, clip_model.token_embedding(tokens).to(image_features.dtype), tokens)
    text = text / text.norm(dim=-1, keepdim=True)
    image_features = image_features / image_features.norm(dim=-1, keepdim=True)
    return clip_model.logit_scale.exp() * image_features @ text.T
