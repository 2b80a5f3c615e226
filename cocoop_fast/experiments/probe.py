"""Fitting a linear probe on the frozen features of a few training images."""

from __future__ import annotations

import time

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.config import RunConfig
from cocoop_fast.data.dataset import Dataset
from cocoop_fast.evaluation.evaluate import Features, encode_test_images
from cocoop_fast.methods import LinearProbe
from cocoop_fast.training.observer import Observer


def fit_probe(
    model: LinearProbe,
    clip: LoadedClip,
    train: Dataset,
    validation: Dataset,
    config: RunConfig,
    observer: Observer,
) -> float:
    """Encode the images as those of a test are, without augmentation, and fit. Returns the seconds it took.

    Args:
        model: to be fitted.
        clip: what it was built on.
        train: its ``train`` images are used.
        validation: its ``val`` images choose C, if there are any.
        config: for the batch size and the workers.
        observer: is told what was chosen.
    """

    def encode(dataset: Dataset) -> Features:
        return encode_test_images(
            model, clip, dataset, batch_size=config.eval_batch_size, workers=config.data.workers
        )

    start = time.perf_counter()
    seen = encode(train.with_splits(test=train.train))
    if validation.val:
        held_out = encode(validation.with_splits(test=validation.val))
        fit = model.fit(seen.image, seen.label, held_out.image, held_out.label)
    else:
        fit = model.fit(seen.image, seen.label)
    how = "CLIP's own choice, for want of validation images"
    if fit.accuracy is not None:
        how = f"{fit.accuracy:.1f} % of {len(validation.val)} validation images are right"
    observer.on_message(f"Linear probe: C = {fit.strength:.3g} ({how}).")
    return time.perf_counter() - start
