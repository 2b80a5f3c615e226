"""Linear probe: logistic regression on frozen image features (Radford et al., 2021, section 3.2).

As in the reference's ``lpclip``: the features are not normalised, and the strength C of the L2 penalty is the one
that does best on validation images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.errors import UserError
from cocoop_fast.methods.base import PromptedCLIP, as_labels

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

GRID = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
STEPS = 8  # halvings of the interval around the best of the grid, on a logarithmic scale
WITHOUT_VALIDATION = 0.316  # what CLIP's authors found by validation on ImageNet
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class ProbeFit:
    """How a probe was fitted.

    Args:
        strength: C, the inverse weight of the penalty.
        accuracy: percent, on the validation images; None without any.
    """

    strength: float
    accuracy: float | None


class LinearProbe(PromptedCLIP):
    """A linear classifier on image features, in place of prompts.

    Its learner is the classifier, K rows of weights over E features with their biases, in float32. It knows the
    classes it was fitted on and no others.

    Args:
        classnames: K class names, which only count: nothing is read from a name.
        clip_model: an open_clip or OpenAI CLIP.
    """

    prompt_learner: nn.Linear

    def __init__(self, classnames: Sequence[str], clip_model: ClipModel) -> None:
        super().__init__(clip_model, len(classnames))
        self.prompt_learner = nn.Linear(self.embed_dim, self.n_classes).to(self.logit_scale.device)
        nn.init.zeros_(self.prompt_learner.weight)
        nn.init.zeros_(self.prompt_learner.bias)

    def logits(self, image_features: Tensor) -> Tensor:
        """(B, E) image features, of the length they have, to (B, K)."""
        self.check(image_features)
        return self.prompt_learner(image_features.to(self.prompt_learner.weight.dtype))

    def loss_and_logits(self, image_features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        label = as_labels(label, image_features)
        self.check(image_features, label)
        logits = self.logits(image_features)
        return F.cross_entropy(logits, label), logits.detach()

    def set_classnames(self, classnames: Sequence[str]) -> None:
        if len(classnames) != self.n_classes:
            raise UserError(
                f"A linear probe knows the {self.n_classes} classes that it was fitted on, not {len(classnames)}; "
                "fit it anew, or use a method that reads class names."
            )

    @torch.no_grad()
    def fit(
        self,
        image_features: Tensor,
        label: Tensor,
        val_features: Tensor | None = None,
        val_label: Tensor | None = None,
    ) -> ProbeFit:
        """Fit the classifier.

        Args:
            image_features: (n, E), with labels (n,) in [0, K).
            val_features: (m, E), with labels (m,); None: C is that which suits ImageNet.

        Raises:
            UserError: a class without images, or a single class.
        """
        images = _arrays(image_features, label)
        missing = sorted(set(range(self.n_classes)) - set(label.tolist()))
        if missing or self.n_classes < 2:
            what = f"class {missing[0]} has none" if missing else "there is one class"
            raise UserError(f"A linear probe needs training images of two or more classes, but {what}.")
        if val_features is None or val_label is None or not len(val_features):
            best, accuracy = _fitted(images, WITHOUT_VALIDATION), None
        else:
            held_out = _arrays(val_features, val_label)
            best = _search(images, held_out)
            accuracy = 100 * best.score(*held_out)
        weight, bias = torch.from_numpy(best.coef_), torch.from_numpy(best.intercept_)
        if self.n_classes == 2:  # one logit, of the second class; that of the first is 0
            weight, bias = (torch.cat([torch.zeros_like(one), one]) for one in (weight, bias))
        self.prompt_learner.weight.copy_(weight)
        self.prompt_learner.bias.copy_(bias)
        return ProbeFit(best.C, accuracy)


Arrays = tuple[np.ndarray, np.ndarray]  # features (n, E) and labels (n,)


def _arrays(features: Tensor, label: Tensor) -> Arrays:
    return features.detach().cpu().double().numpy(), label.cpu().numpy()


def _fitted(images: Arrays, c: float) -> LogisticRegression:
    from sklearn.exceptions import ConvergenceWarning  # takes a second to import
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # Almost no penalty: the optimum lies far out, and where the search stops is part of the recipe.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(*images)


def _search(images: Arrays, held_out: Arrays) -> LogisticRegression:
    """The best of a coarse grid, then a binary search on log C: of both ends the better is kept, the left on a tie."""

    def at(c: float) -> tuple[float, LogisticRegression]:
        classifier = _fitted(images, c)
        return classifier.score(*held_out), classifier

    peak = max(map(at, GRID), key=itemgetter(0))[1].C  # the first on a tie
    left, right = at(0.1 * peak), at(10 * peak)
    for _ in range(STEPS - 1):
        middle = float(np.sqrt(left[1].C * right[1].C))
        if left[0] < right[0]:
            left = at(middle)
        else:
            right = at(middle)
    return max(left, right, key=itemgetter(0))[1]
