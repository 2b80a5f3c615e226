"""The sizes that decide a step's cost, read off a model's shapes and a class tree. No weight is looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cocoop_fast.clip.frozen import TextWeights
from cocoop_fast.prompts.tree import ClassTree


@dataclass(frozen=True)
class TowerSizes:
    """A text transformer."""

    layers: int
    width: int  # d
    mlp_width: int  # w, 4d in CLIP
    heads: int
    embed_dim: int  # E
    context_length: int  # L

    @classmethod
    def of(cls, weights: TextWeights) -> TowerSizes:
        """The sizes of a tower; its tensors may be on any device, meta included."""
        return cls(
            layers=len(weights.blocks),
            width=weights.width,
            mlp_width=weights.blocks[0].fc.weight.shape[0],
            heads=weights.heads,
            embed_dim=weights.projection.weight.shape[1],
            context_length=weights.positional_embedding.shape[0],
        )


@dataclass(frozen=True)
class RowCounts:
    """The rows of one image, and what its attention reads. SOS is a key of every row, and no row."""

    classes: int  # K
    context: int  # M
    nodes: int  # N
    leaves: int  # Q, distinct EOT nodes
    tokens: int  # class tokens of all prompts, EOT included: the nodes if nothing were shared
    longest: int  # tokens of the longest prompt, from SOS to EOT
    pairs: int  # (query, key) pairs of all rows
    leaf_pairs: int  # of the leaves alone

    @classmethod
    def of(cls, tree: ClassTree) -> RowCounts:
        m, depth = tree.n_ctx, tree.depth
        node_keys = depth + m + 2  # SOS, the context, the path down to the node itself
        context_keys = torch.arange(m) + 2
        return cls(
            classes=tree.n_classes,
            context=m,
            nodes=len(tree),
            leaves=len(tree.leaves),
            tokens=int((depth[tree.eot] + 1).sum()),
            longest=1 + m + tree.max_depth,
            pairs=int(node_keys.sum() + context_keys.sum()),
            leaf_pairs=int(node_keys[tree.leaves].sum()),
        )

    @property
    def rows(self) -> int:
        """R = M + N."""
        return self.context + self.nodes
