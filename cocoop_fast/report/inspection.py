"""What a run's model says of its test images, computed anew from its newest checkpoint."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.config import RunConfig, Subset
from cocoop_fast.data import Dataset, Sample
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.data.images import ImageError
from cocoop_fast.data.workers import reading_processes
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.evaluate import Features, autocast, encode_test_images
from cocoop_fast.evaluation.feature_cache import FeatureCache, TestFeatures
from cocoop_fast.evaluation.metrics import Metrics, measure
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.methods import build_model, knows_other_classes
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.learner import ContextLearner
from cocoop_fast.methods.records import METHODS
from cocoop_fast.prompts.tokens import about_unknown_words
from cocoop_fast.report.contexts import ContextToken, Shifts, learned_words, nearest_words, shifts_of
from cocoop_fast.report.sources import Run
from cocoop_fast.runs.checkpoint import load_parameters
from cocoop_fast.runs.directory import read_run

_T = TypeVar("_T")
EXAMPLES = 4  # right ones, and as many wrong ones
TOP = 3
THUMBNAIL = 112  # pixels


@dataclass(frozen=True)
class Example:
    """A test image with what the model takes it for.

    Args:
        thumbnail: PNG, at most THUMBNAIL pixels wide and high.
        truth: its class.
        ranked: the likeliest classes with their probabilities, best first.
    """

    thumbnail: bytes
    truth: str
    ranked: tuple[tuple[str, float], ...]

    @property
    def right(self) -> bool:
        return self.ranked[0][0] == self.truth


@dataclass(frozen=True)
class Tested:
    """One set of classes.

    Args:
        subset: "base", "new" or "all".
        classnames: (K,).
        metrics: over the images that were looked at.
        images: test images there are; more than ``metrics.total`` if not all were looked at.
        class_accuracy: (K,) percent, as the run recorded it, or if it did not, of the images that were looked at;
            ``None`` where a class has no image.
        class_images: (K,) how many images that is of.
        train_images: (K,) training images of each class, where they were recorded; empty for classes not trained on.
        unknown: a sentence about names whose words the model never saw; empty if it knows all.
        examples: wrong ones first, the surest mistakes at the front.
    """

    subset: Subset
    classnames: tuple[str, ...]
    metrics: Metrics
    images: int
    class_accuracy: Sequence[float | None]
    class_images: Sequence[int]
    train_images: Sequence[int]
    unknown: str
    examples: tuple[Example, ...]

    @property
    def chance(self) -> float:
        """The accuracy of guessing, in percent."""
        return 100 / len(self.classnames)

    def confused(self, most: int) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: true class, predicted class, how many times."""
        matrix = np.array(self.metrics.confusion)
        np.fill_diagonal(matrix, 0)
        order = np.argsort(-matrix, axis=None, kind="stable")[:most]
        places = zip(*np.unravel_index(order[matrix.flat[order] > 0], matrix.shape), strict=True)
        return [(self.classnames[row], self.classnames[k], int(matrix[row, k])) for row, k in places]


@dataclass(frozen=True)
class Inspection:
    """What was seen of one run.

    Args:
        run: which.
        tested: what it says of its test images.
        words: near to the learned context; empty if there is none.
        moved_words: near to the context that the mean image has; empty if it is the same for all.
        shifts: how images move it; ``None`` likewise.
        model: over the classes that were trained on.
        clip: what it was built on.
    """

    run: Run
    tested: tuple[Tested, ...]
    words: tuple[ContextToken, ...]
    moved_words: tuple[ContextToken, ...]
    shifts: Shifts | None
    model: PromptedCLIP
    clip: LoadedClip


class Inspector:
    """Looks at runs. CLIP models and lists of images are loaded once.

    Args:
        most_images: test images looked at in each set of classes, evenly spread; all if there are fewer.
        device: where to compute; ``None``: as each run's configuration says.
    """

    def __init__(self, most_images: int, device: str | None = None) -> None:
        self._most_images = most_images
        self._device = device
        self._shared: dict[Path | None, Shared] = {}

    def inspect(self, run: Run) -> Inspection:
        """Load a run's model and show it the test images.

        Raises:
            UserError: no checkpoint yet, or the model or the images are not there any more.
        """
        config, newest = read_run(run.path)
        cache = FeatureCache(run.features or run.path / "features")  # a run of its own has none there
        shared = self._shared.setdefault(run.features, Shared(cache))
        clip = shared.clip(replace(config.model, device=self._device or config.model.device))
        dataset = shared.test_set(config.data)
        kept = cache.find(clip, dataset)

        def model_over(classnames: Sequence[str]) -> PromptedCLIP:
            model = build_model(
                config.prompt,
                list(classnames),
                clip,
                backend=config.model.backend,
                memory_budget=config.model.memory_budget,
            )
            load_parameters(model, newest.parameters, str(run.path))
            model.prompt_learner.eval()
            return model

        trained = model_over(newest.classnames)
        own = config.data.subset
        both = own == "base" and knows_other_classes(config.prompt)
        subsets: tuple[Subset, ...] = ("base", "new") if both else (own,)
        learns = METHODS[config.prompt.method].learns
        tested: list[Tested] = []
        images: list[Tensor] = []
        labels: list[Tensor] = []  # into `names`, those of all subsets
        names: tuple[str, ...] = ()
        for subset in subsets:
            classes = select_classes(dataset, subset)
            shown = classes.with_splits(test=_spread(classes.test, self._most_images))
            same = classes.classnames == tuple(newest.classnames)
            model = trained if same else model_over(classes.classnames)
            seen = _features(kept, model, clip, shown, config)
            images.append(seen.image)
            labels.append(seen.label + len(names))
            names += shown.classnames
            probability = _probability(model, clip, seen.image, config.eval_batch_size)
            metrics = measure(seen.label.numpy(), probability.argmax(dim=1).numpy(), len(shown.classnames))
            recorded = run.class_accuracy(subset, len(shown.classnames))
            tested.append(
                Tested(
                    subset=subset,
                    classnames=shown.classnames,
                    metrics=metrics,
                    images=len(classes.test),
                    class_accuracy=recorded or metrics.per_class_accuracy,
                    class_images=classes.images_of_classes((classes if recorded else shown).test),
                    train_images=run.history.start.get("class_images", ()) if same and learns else (),
                    unknown=about_unknown_words(shown.classnames, clip.known_tokens),
                    examples=_examples(shown, probability, seen.label),
                )
            )
        words: tuple[ContextToken, ...] = ()
        moved_words: tuple[ContextToken, ...] = ()
        shifts = None
        learner = trained.prompt_learner
        if isinstance(learner, ContextLearner):
            first_class = newest.classnames[0]
            words = learned_words(learner, clip, first_class)
            features = torch.cat(images).to(learner.ctx.device)
            trained_on = len(tested[0].classnames)  # the first subset is what was trained on
            shifts = shifts_of(learner, features, torch.cat(labels), names, trained_on)
            if shifts is not None:
                moved_words = nearest_words(learner.ctx.detach().cpu() + shifts.mean, clip, first_class)
        return Inspection(run, tuple(tested), words, moved_words, shifts, trained, clip)


def _features(
    kept: TestFeatures | None, model: PromptedCLIP, clip: LoadedClip, shown: Dataset, config: RunConfig
) -> Features:
    """Image features of the images that are shown: those that a protocol kept, or new ones."""
    if kept is not None and {one.source for one in shown.test} <= {one.source for one in kept.samples}:
        return kept.select(shown.test, clip.device)
    return encode_test_images(
        model,
        clip,
        shown,
        batch_size=config.eval_batch_size,
        workers=reading_processes(config.data.workers, clip.device),
    )


@torch.no_grad()
def _probability(model: PromptedCLIP, clip: LoadedClip, image: Tensor, batch_size: int) -> Tensor:
    """(n, K) on the CPU, of images with features (n, E)."""
    logits = []
    for part in image.split(batch_size):
        with autocast(clip.precision, clip.device):
            logits.append(model.forward_features(part).float().cpu())
    return torch.cat(logits).softmax(dim=1)


def _examples(shown: Dataset, probability: Tensor, label: Tensor) -> tuple[Example, ...]:
    examples = []
    for row in choose_examples(probability, label):
        values, columns = probability[row].topk(min(TOP, len(shown.classnames)))
        best = zip(columns.tolist(), values.tolist(), strict=True)
        examples.append(
            Example(
                thumbnail=_thumbnail(shown, shown.test[row]),
                truth=shown.classnames[shown.test[row].label],
                ranked=tuple((shown.classnames[k], value) for k, value in best),
            )
        )
    return tuple(examples)


def choose_examples(probability: Tensor, label: Tensor, each: int = EXAMPLES) -> list[int]:
    """Rows worth looking at: the surest mistakes, each of another true class where possible, then right ones.

    Args:
        probability: (n, K).
        label: (n,) int64.
        each: how many wrong ones and right ones at most.
    """
    best, predicted = probability.max(dim=1)
    surest_first = best.argsort(descending=True, stable=True).tolist()
    wrong = [row for row in surest_first if predicted[row] != label[row]]
    right = tuple(row for row in range(len(label)) if predicted[row] == label[row])
    surest_of_class = set({int(label[row]): row for row in reversed(wrong)}.values())
    wrong.sort(key=lambda row: row not in surest_of_class)  # otherwise they stay in their order
    return [*wrong[:each], *_spread(right, each)]


def _thumbnail(dataset: Dataset, sample: Sample) -> bytes:
    try:
        image = dataset.read(sample).copy()
    except ImageError as error:
        raise UserError(f"The image {sample.source} in {dataset.where} cannot be read: {error}.") from error
    image.thumbnail((THUMBNAIL, THUMBNAIL), Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _spread(items: tuple[_T, ...], count: int) -> tuple[_T, ...]:
    """``count`` of them, evenly spaced; all if there are fewer."""
    if len(items) <= count:
        return items
    return tuple(items[i * len(items) // count] for i in range(count))
