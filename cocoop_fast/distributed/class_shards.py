"""The classes of a model shared out among ranks: each encodes its own part of the class tree.

The logits of all classes are gathered, so every rank has the loss and its gradient by every logit. Each goes backward
through the classes that it encoded: the gradient is the sum over the ranks. They exchange B x K logits a step; with a
consistency loss, also the distances of the classes' features from their anchor, which enter it as a mean.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoop_fast.distributed.ranks import Group
from cocoop_fast.engine.pruning import Pruned, backward_through, choose_classes
from cocoop_fast.errors import UserError
from cocoop_fast.methods.base import ImageClassifier, LearnedPromptCLIP
from cocoop_fast.ops.consistency import distances_ref, weighed
from cocoop_fast.ops.head import cosine_logits_ref
from cocoop_fast.prompts.tree import ClassTree


def share_classes(model: ImageClassifier, group: Group) -> ImageClassifier | ClassShards:
    """The model, or, in a group of several ranks, what computes its loss on all of them together.

    Raises:
        UserError: more ranks than distinct prompts.
    """
    # Other models have nothing to learn in steps.
    return ClassShards(model, group) if group.size > 1 and isinstance(model, LearnedPromptCLIP) else model


class ClassShards:
    """The loss of a model whose classes are shared out among ranks.

    It and the logits are those of all classes, on every rank alike. The gradient is that of the classes of this rank.

    Args:
        model: the same one on all ranks.
        group: all of them.
    """

    def __init__(self, model: LearnedPromptCLIP, group: Group) -> None:
        self._model = model
        self._group = group
        self._shares = balanced_shares(model.tree_encoder.tree, group.size)
        self._own = self._shares[group.index]
        self._encode = model.tree_encoder.part(self._own)
        self._place = torch.cat(self._shares).argsort()  # of each class among the gathered ones
        self.pruned: Pruned | None = None

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """As the model has it; its gradient is that of this rank's classes alone."""
        image_features = self._model.checked(image_features, label)
        if self._model.prune_mass and torch.is_grad_enabled():
            return self._pruned(image_features, label)
        own, distances = self._group.all_or_none(partial(self._own_part, image_features))
        logits = self._of_all(own)
        loss = F.cross_entropy(logits, label)
        anchor = self._model.anchor
        if anchor is not None and distances is not None:
            scale = self._model.logit_scale.exp()
            loss = loss + weighed(self._of_all(distances), logits, image_features, scale, anchor)
        return loss, logits.detach()

    def lower_memory(self, batch: int) -> None:
        """As the model has it, by the size of this rank's part."""
        self._encode.lower_memory(batch)

    def _pruned(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Every rank chooses the same classes, and goes backward through those of them that are its own."""
        model = self._model
        with torch.no_grad():
            logits = self._of_all(self._group.all_or_none(partial(self._own_part, image_features))[0])
            loss = F.cross_entropy(logits, label)
            kept = choose_classes(logits, label, model.prune_mass)
            mine = torch.isin(kept.classes, self._own.to(kept.classes.device))
        self.pruned = kept.pruned
        loss = backward_through(
            model.tree_encoder,
            model.prompt_learner.contexts(image_features),
            image_features,
            model.logit_scale,
            loss,
            kept.classes[mine],
            kept.weights[:, mine],
        )
        return loss, logits

    def _of_all(self, own: Tensor) -> Tensor:
        """(B, K) of all classes from (B, n) of this rank's. Those of others are numbers without a gradient."""
        sizes = [len(share) for share in self._shares]
        parts = self._group.gather(F.pad(own.detach(), (0, max(sizes) - own.shape[1])))
        columns = torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)
        return columns[:, self._place.to(own.device)].index_copy(1, self._own.to(own.device), own)

    def _own_part(self, image_features: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, n) logits of this rank's classes, in float32 at least, and their distances from the anchor, if there is one."""
        text = self._encode(self._model.prompt_learner.contexts(image_features))
        text = text if text.ndim == 3 else text[None]
        own = cosine_logits_ref(image_features, text, self._model.logit_scale)
        wide = torch.promote_types(own.dtype, torch.float32)
        anchor = self._model.anchor
        if anchor is None:
            return own.to(wide), None
        part = replace(anchor, features=anchor.features[self._own.to(anchor.features.device)])
        return own.to(wide), distances_ref(text, part).to(wide)


def balanced_shares(tree: ClassTree, parts: int) -> list[Tensor]:
    """Classes in parts of about as many rows each; classes with the same prompt stay together.

    Nodes are in depth-first order, so each leaf brings those between it and the leaf before along. The few rows above
    the first leaf of a part are computed by the part before as well.

    Returns:
        (n,) int64 class numbers, ascending, of each part; none is empty.

    Raises:
        UserError: more parts than distinct prompts.
    """
    leaves = len(tree.leaves)
    if parts > leaves:
        raise UserError(
            f"{leaves} classes cannot be shared by {parts} ranks, as each needs one of its own; start fewer ranks, or "
            "use --shard images with a larger batch."
        )
    ideal = torch.arange(1, parts) * len(tree) // parts
    first = torch.searchsorted(tree.leaves, ideal).tolist()
    for i in range(len(first)):  # at least one leaf for each part, before and after
        first[i] = min(max(first[i], i + 1, first[i - 1] + 1 if i else 0), leaves - (parts - 1 - i))
    part_of_leaf = torch.bucketize(torch.arange(leaves), torch.tensor(first, dtype=torch.int64), right=True)
    part_of_class = part_of_leaf[tree.leaf_of_class]
    return [(part_of_class == part).nonzero()[:, 0] for part in range(parts)]
