"""What people hand to an estimator: images in any form, features, labels of any kind and what these are called."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from cocoop_fast.data.dataset import Sample
from cocoop_fast.data.images import any_rgb
from cocoop_fast.errors import UserError

# What X holds: images as a list of what `any_rgb` takes, or preprocessed (n, 3, S, S); or features (n, E).
Given = list[Any] | Tensor | np.ndarray


def images_of(X: Any) -> list[Any] | Tensor | None:
    """Images, as far as these are some; ``None``: they are to be features.

    Raises:
        UserError: an array that is neither.
    """
    if isinstance(X, Tensor):
        X = X.detach().float().cpu().numpy() if X.is_floating_point() else X.cpu().numpy()
    if isinstance(X, np.ndarray) and X.ndim > 2:
        if X.dtype == np.uint8 and (X.ndim == 3 or (X.ndim == 4 and X.shape[3] in (3, 4))):
            return list(X)
        if X.dtype.kind == "f" and X.ndim == 4 and X.shape[1] == 3:
            return torch.from_numpy(np.ascontiguousarray(X))
        raise UserError(
            f"`X` is {X.dtype} of {X.shape}; arrays of images are bytes (n, H, W, 3) or (n, H, W), or floating point "
            "(n, 3, S, S), preprocessed as this CLIP expects."
        )
    if isinstance(X, (str, os.PathLike, Image)):
        raise UserError("`X` is a single image; give a list of images, which may have one.")
    if getattr(X, "ndim", 1) != 1 or not hasattr(X, "__len__") or not len(X) or isinstance(X, Mapping):
        return None
    first = next(iter(X))
    kinds = (str, os.PathLike, Image)
    if isinstance(first, kinds) or (isinstance(first, np.ndarray) and first.ndim > 1):
        return [os.fspath(one) if isinstance(one, os.PathLike) else one for one in X]
    return None


def samples_of(given: Given, labels: np.ndarray, names: Sequence[str]) -> tuple[Sample, ...]:
    """Files are named by their paths in messages, other images by their places."""
    return tuple(
        Sample(
            str(given[i]) if isinstance(given, list) and isinstance(given[i], str) else i, label, names[label]
        )
        for i, label in enumerate(labels.tolist())
    )


@dataclass(frozen=True)
class Reader:
    given: Any

    def __call__(self, sample: Sample) -> Image:
        source: Any = sample.source
        return any_rgb(self.given[source] if isinstance(source, int) else source)


def called(
    classnames: Sequence[str] | Mapping[Any, str] | None, labels: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (K,) of classes, sorted, and what these are called; ``labels`` are some of them, or of their kind."""
    if isinstance(classnames, str):
        raise UserError(f"`classnames` is the text {classnames!r}; give a list of names.")
    numbers = labels.dtype.kind in "biuf"
    if classnames is None:
        classes = np.unique(labels)
        return classes, tuple(f"{one:g}" if labels.dtype.kind == "f" else str(one) for one in classes)
    if isinstance(classnames, Mapping):
        try:
            pairs = dict(sorted(classnames.items()))
            classes = np.array(list(pairs), dtype=labels.dtype if numbers else None)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"`classnames` maps {', '.join(map(repr, list(classnames)[:3]))} to names, but labels are {labels.dtype}; map "
                "the labels of `y`."
            ) from error
        return classes, tuple(pairs.values())
    names = tuple(classnames)
    if numbers:
        return np.arange(len(names)).astype(labels.dtype), names
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"Two classes are called {double!r}, so that the label {double!r} is either; give a mapping from labels to names."
        )
    names = tuple(sorted(names))
    return np.array(names), names
