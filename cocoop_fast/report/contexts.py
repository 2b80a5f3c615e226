"""What a learned context is near to, and how far images move it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.clip.tokenizer import word_of
from cocoop_fast.engine.contexts import dense_contexts
from cocoop_fast.methods.learner import ContextLearner

NEAREST = 5


@dataclass(frozen=True)
class ContextToken:
    """One learned context vector.

    Args:
        place: "1", or "class name, 1" if each class has its own, or "before color, 1" if it belongs to an attribute.
        length: of the vector.
        nearest: words of the vocabulary with the Euclidean distance of their embedding, nearest first.
        typical: the mean distance to all words, which tells whether the nearest one is near.
    """

    place: str
    length: float
    nearest: tuple[tuple[str, float], ...]
    typical: float


@dataclass(frozen=True, eq=False)
class Shifts:
    """How images move the context: contexts(x) - ctx over n test images.

    Args:
        points: (n, 2) float64, coordinates along the first two principal components.
        explained: share of the variance along each.
        mean: (M, d), the mean shift.
        spread: how far an image's shift is from the mean one: the root mean square over images and tokens.
        label: (n,) int64 into ``classnames``.
        classnames: of the classes whose images they are, those trained on first.
        trained_on: how many those are.
    """

    points: Tensor
    explained: tuple[float, float]
    mean: Tensor
    spread: float
    label: Tensor
    classnames: tuple[str, ...]
    trained_on: int


@torch.no_grad()
def nearest_words(
    vectors: Tensor, clip: LoadedClip, first_class: str, count: int = NEAREST
) -> tuple[ContextToken, ...]:
    """The nearest words of each context vector, by token embedding (the reference's ``interpret_prompt``).

    The distances are to the embedding of the model itself, among the words that it was trained on. Of class-specific
    contexts the first class's are shown.

    Args:
        vectors: (M, d) or (K, M, d).
        clip: the model that they were learned for.
        first_class: its name.
        count: words for each vector.
    """
    table = FrozenCLIP(clip.model).text_weights().token_embedding.float()
    ids = torch.arange(len(table)) if clip.known_tokens is None else torch.tensor(sorted(clip.known_tokens))
    ctx, prefix = vectors.detach().float().cpu(), ""
    if ctx.ndim == 3:
        ctx, prefix = ctx[0], f"{first_class}, "
    words = table[ids.to(table.device)].cpu()
    # Differences, not products: the distance to a vector itself is then 0, and small ones are exact.
    distance = torch.cdist(ctx, words, compute_mode="donot_use_mm_for_euclid_dist")  # (M, V)
    near = distance.topk(min(count, len(ids)), largest=False)
    found = zip(
        ctx.norm(dim=1).tolist(), ids[near.indices].tolist(), near.values.tolist(), distance.mean(dim=1).tolist(),
        strict=True,
    )  # fmt: skip
    return tuple(
        ContextToken(f"{prefix}{m}", length, tuple(zip(map(word_of, tokens), values, strict=True)), typical)
        for m, (length, tokens, values, typical) in enumerate(found, 1)
    )


def learned_words(learner: ContextLearner, clip: LoadedClip, first_class: str) -> tuple[ContextToken, ...]:
    """:func:`nearest_words` of all that a learner has, in the order of the prompt."""
    found: list[ContextToken] = []
    for n, attribute in enumerate(learner.attributes, 1):
        own = nearest_words(getattr(learner, f"ctx_att{n}"), clip, first_class)
        found += [replace(token, place=f"before {attribute}, {token.place}") for token in own]
    return (*found, *nearest_words(learner.ctx, clip, first_class))


@torch.no_grad()
def shifts_of(
    learner: ContextLearner,
    image_features: Tensor,
    label: Tensor,
    classnames: tuple[str, ...],
    trained_on: int,
) -> Shifts | None:
    """What images add to the context (the Meta-Net's bias), in two dimensions; ``None`` if it is the same for all.

    Args:
        learner: of any method with a context.
        image_features: (n, E), of any length.
        label: (n,) int64.
        classnames: what the labels mean; the classes trained on come first.
        trained_on: how many those are.
    """
    unit = image_features / image_features.norm(dim=-1, keepdim=True)
    moved = dense_contexts(learner.contexts(unit))
    ctx = learner.ctx.detach()
    if moved.ndim == ctx.ndim or len(unit) < 3:
        return None
    shift = (moved[..., -learner.n_ctx :, :] - ctx).double().cpu()  # (n, M, d)
    if shift.ndim == 4:  # class-specific contexts are all moved alike
        shift = shift[:, 0]
    points, explained = principal_components(shift.flatten(1))
    mean = shift.mean(dim=0)
    spread = float((shift - mean).norm(dim=-1).square().mean().sqrt())
    return Shifts(points, explained, mean, spread, label, classnames, trained_on)


def principal_components(x: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Coordinates of (n, D) points along the first two principal components, (n, 2), and their shares of variance.

    Signs are chosen so that the component's largest entry is positive. Of points that do not differ, all is 0.
    """
    centred = x - x.mean(dim=0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    axes = vh[:2] * vh[:2].gather(1, vh[:2].abs().argmax(dim=1, keepdim=True)).sign()
    variance = s.square() / s.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    return centred @ axes.T, (float(variance[0]), float(variance[1]))
