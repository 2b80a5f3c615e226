"""What training and evaluation ask of a model: the methods of this package have it, and the dense oracle too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class PromptClassifier(Protocol):
    """A frozen CLIP with a prompt learner. Shapes: B images, E embedding, K classes."""

    @property
    def prompt_learner(self) -> nn.Module:
        """Its parameters are all that is learned, and its mode is the model's."""

    @property
    def image_encoder(self) -> Any:
        """Images (B, 3, H, W) of dtype ``dtype`` to features (B, E)."""

    @property
    def dtype(self) -> torch.dtype: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def forward_features(self, image_features: Tensor) -> Tensor:
        """(B, E) to logits (B, K), in evaluation mode."""

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E) and (B,) to the scalar loss and the logits (B, K), detached."""
