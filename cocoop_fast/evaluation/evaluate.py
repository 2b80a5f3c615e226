"""Accuracy of a model on a list of images. Image features are computed once and shared between models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.data.batches import test_batches
from cocoop_fast.data.dataset import Dataset
from cocoop_fast.data.transforms import Normalize, TestTransform
from cocoop_fast.distributed.ranks import ALONE, Ranks
from cocoop_fast.engine.graphs import Record, Recorded
from cocoop_fast.evaluation.metrics import Metrics, measure
from cocoop_fast.methods.base import ImageClassifier, LearnedPromptCLIP

Progress = Callable[[int, int], None]  # images done, images in all

# An evaluation of fewer batches is over before a graph has gained what recording it takes.
WORTH_RECORDING = 32


@dataclass(frozen=True)
class Features:
    """image (n, E) features on the model's device, in the samples' order; label (n,) int64 on the CPU."""

    image: Tensor
    label: Tensor


def test_transform(clip: LoadedClip) -> TestTransform:
    """The transform that a CLIP's images need."""
    normalize = Normalize(clip.mean, clip.std)
    return TestTransform(clip.image_size, normalize, clip.resize_mode, clip.interpolation)


test_transform.__test__ = False  # type: ignore[attr-defined]  # pytest goes by the name, and this is not a test


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Mixed precision for "amp" (float16 on a GPU, bfloat16 on a CPU), nothing otherwise."""
    if precision != "amp":
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16)


@torch.no_grad()
def encode_test_images(
    model: ImageClassifier,
    clip: LoadedClip,
    dataset: Dataset,
    *,
    batch_size: int = 100,
    workers: int = 0,
    progress: Progress | None = None,
) -> Features:
    """Features of the test images of a data set, by the frozen image encoder.

    Args:
        model: any model on ``clip``; its ``image_encoder`` and ``dtype`` are used.
        clip: for the transform, the device and the precision.
        dataset: its ``test`` samples are encoded.
        batch_size: images at once.
        workers: processes that decode ahead.
        progress: told after each batch.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    done = 0
    on_gpu = clip.device.type == "cuda"
    for batch in test_batches(
        dataset, dataset.test, test_transform(clip), batch_size, workers, pin_memory=on_gpu
    ):
        image = batch.image.to(clip.device, model.dtype, non_blocking=True)
        with autocast(clip.precision, clip.device):
            features.append(model.image_encoder(image))
        labels.append(batch.label)
        done += len(batch.label)
        if progress is not None:
            progress(done, len(dataset.test))
    if not features:  # of few images not every rank has one
        return Features(torch.empty(0, 0, device=clip.device), torch.empty(0, dtype=torch.int64))
    return Features(torch.cat(features), torch.cat(labels))


@torch.no_grad()
def evaluate(
    model: ImageClassifier,
    features: Features,
    n_classes: int,
    *,
    batch_size: int = 100,
    precision: str = "fp32",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    record: Record | None = None,
    on_message: Callable[[str], None] = lambda message: None,
) -> Metrics:
    """Classify images and compare with their labels. The model is put into evaluation mode.

    Args:
        model: ``forward_features(image_features (B, E))`` gives logits (B, K).
        features: n images with labels in [0, K).
        n_classes: K.
        batch_size: images at once.
        precision: "amp" computes under autocast.
        progress: told after each batch.
        ranks: each has some of the images; all get the metrics of them all.
        record: where there are many batches, what a learned context makes of one is recorded by it and replayed; ``None``: each
            is launched anew.
        on_message: told why batches are not recorded, if they cannot be.

    Raises:
        UserError: features of the wrong width or not finite.
    """
    model.prompt_learner.eval()
    logits_of: Callable[[Tensor], Tensor] = model.forward_features
    many = len(features.image) >= WORTH_RECORDING * batch_size
    if record is not None and many and isinstance(model, LearnedPromptCLIP):
        model.check(features.image)  # all at once: a replay looks at no values
        why_not = partial(model.why_not_recorded, training=False)
        logits_of = Recorded(logits_of, on_message, record, why_not, name="batches of an evaluation")
    called = classify(
        logits_of, features.image, batch_size=batch_size, precision=precision, progress=progress
    )
    labels, called = from_all_ranks(ranks, features.label.numpy(), called)
    return measure(labels, called, n_classes)


@torch.no_grad()
def classify(
    logits_of: Callable[[Tensor], Tensor],
    image_features: Tensor,
    *,
    batch_size: int,
    precision: str,
    progress: Progress | None = None,
) -> np.ndarray:
    """The likeliest class of each image, (n,) int64.

    Args:
        logits_of: from (B, E) image features to (B, K).
        image_features: (n, E).
        batch_size, precision, progress: as for :func:`evaluate`.
    """
    called = [np.empty(0, dtype=np.int64)]
    done = 0
    for image in image_features.split(batch_size) if len(image_features) else ():
        with autocast(precision, image.device):
            logits = logits_of(image)
        called.append(logits.argmax(dim=1).cpu().numpy())
        done += len(image)
        if progress is not None:
            progress(done, len(image_features))
    return np.concatenate(called)


def from_all_ranks(ranks: Ranks, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """What every rank has of each array, one after the other."""
    return tuple(np.concatenate(parts) for parts in zip(*ranks.everyone.gather_objects(arrays), strict=True))
