"""Evaluation by shortlists: each image chooses among the classes that the context without the image makes likeliest.

A prompt with the image's context costs a pass through the text tower for every image. Without what the image adds to it the
context is the same for all images, and all classes are encoded once. What the image adds changes the order of classes a
little; so the n likeliest classes of an image that way hold nearly always its likeliest one, and only they are encoded with
its own context. This is not exact. A random sample of the images is evaluated both ways, and the result says how they differ.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.distributed.ranks import ALONE, Ranks
from cocoop_fast.engine.contexts import ShiftedContext
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.evaluate import Features, Progress, classify, from_all_ranks
from cocoop_fast.evaluation.metrics import Comparison, Metrics, measure
from cocoop_fast.methods.base import LearnedPromptCLIP, PromptedCLIP
from cocoop_fast.ops.head import cosine_logits_ref

# The sample is such that its images cost, with all classes, about this share of what the shortlists of all images do;
# within these bounds.
_COST_OF_SAMPLE = 0.25
LEAST_SAMPLE, LARGEST_SAMPLE = 100, 1000


class ShortlistClassifier:
    """A model whose images each choose among a shortlist of the classes.

    Args:
        model: whose context is one that all classes share, and what each image adds to it.
        n: classes on a shortlist; more than K are K.

    Raises:
        UserError: n is no number of classes, or the model's context is not of this kind.
    """

    def __init__(self, model: PromptedCLIP, n: int) -> None:
        if n < 1:
            raise UserError(f"A shortlist has at least one class, but {n} were asked for.")
        contexts = None
        if isinstance(model, LearnedPromptCLIP):
            any_image = torch.ones(1, model.embed_dim, dtype=model.dtype, device=model.logit_scale.device)
            with torch.no_grad():
                contexts = model.prompt_learner.contexts(any_image / any_image.norm())
        if isinstance(contexts, Tensor) and contexts.ndim == 4:
            raise UserError(
                "A shortlist needs a context that all classes share, but here each has its own (csc); evaluate without it."
            )
        if not isinstance(model, LearnedPromptCLIP) or not isinstance(contexts, ShiftedContext):
            raise UserError(
                "No image changes the classes of this model: they are encoded once for all images, and a shortlist would save "
                "nothing; evaluate without it."
            )
        self.model, self.n = model, min(n, model.n_classes)
        self._shared = contexts.vectors

    @torch.no_grad()
    def forward_features(self, image_features: Tensor) -> Tensor:
        """(B, E) to logits (B, K): the model's own, and minus infinity beyond the shortlists."""
        model = self.model
        image = model.checked(image_features)
        likely = model.averaged(cosine_logits_ref(image, self._without_image, model.logit_scale), image)
        chosen = likely.topk(self.n, dim=1).indices
        contexts = model.prompt_learner.contexts(image)
        assert isinstance(contexts, ShiftedContext)
        text = model.tree_encoder.encode_own_classes(contexts, chosen)
        logits = cosine_logits_ref(image, text, model.logit_scale)
        of_all = torch.full_like(likely, -torch.inf, dtype=logits.dtype).scatter(1, chosen, logits)
        return model.averaged(of_all, image)

    @cached_property
    def _without_image(self) -> Tensor:
        """(1, K, E) text features of the shared context alone."""
        return self.model.tree_encoder(self._shared)[None]


def sample_size(images: int, n: int, n_classes: int) -> int:
    """How many of the images are evaluated with all classes as well.

    Args:
        images: in all.
        n: classes on a shortlist.
        n_classes: K.
    """
    affordable = round(_COST_OF_SAMPLE * images * n / n_classes)
    return min(images, max(LEAST_SAMPLE, min(LARGEST_SAMPLE, affordable)))


@torch.no_grad()
def evaluate_by_shortlist(
    shortlisted: ShortlistClassifier,
    features: Features,
    *,
    seed: int,
    batch_size: int = 100,
    precision: str = "fp32",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Metrics:
    """:func:`cocoop_fast.evaluation.evaluate.evaluate` by shortlists, and what all classes give on a sample of the images.

    Args:
        shortlisted: the model.
        features: images with labels in [0, K).
        seed: draws the sample.
        batch_size, precision, progress, ranks: as for ``evaluate``.
    """
    model, n, count = shortlisted.model, shortlisted.n, len(features.image)
    model.prompt_learner.eval()
    images = sum(ranks.everyone.gather_objects(count))
    own_share = ranks.everyone.share(range(sample_size(images, n, model.n_classes)))
    generator = torch.Generator().manual_seed(seed + ranks.everyone.index)
    sample = torch.randperm(count, generator=generator)[: len(own_share)]
    # One image with all classes is worth several with a shortlist.
    worth = model.n_classes / n

    def tell(done: float) -> None:
        if progress is not None:
            progress(int(count * done / (count + worth * len(sample))), count)

    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    by_list = classify(
        shortlisted.forward_features, features.image, **how, progress=lambda done, _: tell(done)
    )
    by_all = classify(
        model.logits,
        features.image[sample.to(features.image.device)],
        **how,
        progress=lambda done, _: tell(count + worth * done),
    )
    labels, rows = features.label.numpy(), sample.numpy()
    compared = from_all_ranks(ranks, labels[rows], by_list[rows], by_all)
    labels, by_list = from_all_ranks(ranks, labels, by_list)
    metrics = measure(labels, by_list, model.n_classes)
    return replace(metrics, shortlist=Comparison.of(n, seed, *compared))
