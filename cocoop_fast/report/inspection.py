"""What a run's model says of its test images, computed anew from its newest checkpoint."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL.Image import Resampling
from torch import Tensor

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.config import RunConfig, Subset
from cocoop_fast.data import Dataset, Sample
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.data.images import ImageError
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.evaluate import Features, autocast, encode_test_images
from cocoop_fast.evaluation.feature_cache import FeatureCache
from cocoop_fast.evaluation.metrics import Metrics, measure
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.methods import build_model, knows_other_classes
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.learner import ContextLearner
from cocoop_fast.report.contexts import ContextToken, Shifts, nearest_words, shifts_of
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
        examples: wrong ones first, the surest mistakes at the front.
    """

    subset: Subset
    classnames: tuple[str, ...]
    metrics: Metrics
    images: int
    examples: tuple[Example, ...]


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
        shared = self._shared.setdefault(
            run.features, Shared(FeatureCache(run.features or run.path / "features"))
        )
        model_config = replace(config.model, device=self._device or config.model.device)
        clip = shared.clip(model_config)
        dataset = shared.test_set(config.data)
        model = trained = self._model(config, newest.classnames, clip)
        load_parameters(model, newest.parameters, str(run.path))
        learner = trained.prompt_learner
        tested = []
        features = []
        for subset in self._subsets(config):
            classes = select_classes(dataset, subset)
            shown = classes.with_splits(test=_spread(classes.test, self._most_images))
            if classes.classnames != tuple(newest.classnames):
                model = self._model(config, classes.classnames, clip)
                load_parameters(model, newest.parameters, str(run.path))
            seen = self._features(
                model, clip, dataset, shown, config, shared, cached=run.features is not None
            )
            features.append(seen)
            tested.append(_test(model, clip, shown, seen, subset, len(classes.test), config.eval_batch_size))
        words: tuple[ContextToken, ...] = ()
        moved_words: tuple[ContextToken, ...] = ()
        shifts = None
        if isinstance(learner, ContextLearner):
            words = nearest_words(learner.ctx, clip, newest.classnames[0])
            shifts = _shifts(learner, tested, features)
            if shifts is not None:
                moved = learner.ctx.detach().cpu() + shifts.mean
                moved_words = nearest_words(moved, clip, newest.classnames[0])
        return Inspection(run, tuple(tested), words, moved_words, shifts, trained, clip)

    @staticmethod
    def _subsets(config: RunConfig) -> tuple[Subset, ...]:
        """The sets of classes that the run is evaluated on."""
        own = config.data.subset
        return ("base", "new") if own == "base" and knows_other_classes(config.prompt) else (own,)

    @staticmethod
    def _model(config: RunConfig, classnames: Sequence[str], clip: LoadedClip) -> PromptedCLIP:
        return build_model(
            config.prompt,
            list(classnames),
            clip,
            backend=config.model.backend,
            memory_budget=config.model.memory_budget,
        )

    def _features(
        self,
        model: PromptedCLIP,
        clip: LoadedClip,
        dataset: Dataset,
        shown: Dataset,
        config: RunConfig,
        shared: Shared,
        *,
        cached: bool,
    ) -> Features:
        """Image features of the images that are shown: those that a protocol kept, or new ones."""
        found = shared.features.find(clip, dataset) if cached else None
        if found is not None and {sample.source for sample in shown.test} <= {
            s.source for s in found.samples
        }:
            return found.select(shown.test, clip.device)
        return encode_test_images(
            model, clip, shown, batch_size=config.eval_batch_size, workers=config.data.workers
        )


@torch.no_grad()
def _test(
    model: PromptedCLIP,
    clip: LoadedClip,
    shown: Dataset,
    seen: Features,
    subset: Subset,
    images: int,
    batch_size: int,
) -> Tested:
    model.prompt_learner.eval()
    logits = []
    for part in seen.image.split(batch_size):
        with autocast(clip.precision, clip.device):
            logits.append(model.forward_features(part).float().cpu())
    probability = torch.cat(logits).softmax(dim=1)
    predicted = probability.argmax(dim=1)
    metrics = measure(seen.label.numpy(), predicted.numpy(), len(shown.classnames))
    examples = tuple(
        Example(
            thumbnail=_thumbnail(shown, shown.test[row]),
            truth=shown.classnames[shown.test[row].label],
            ranked=_ranked(probability[row], shown.classnames),
        )
        for row in choose_examples(probability, seen.label)
    )
    return Tested(subset, shown.classnames, metrics, images, examples)


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
    right = [row for row in range(len(label)) if predicted[row] == label[row]]
    first_of_class = list({int(label[row]): row for row in reversed(wrong)}.values())[::-1]
    rest = [row for row in wrong if row not in set(first_of_class)]
    return (first_of_class + rest)[:each] + list(_spread(tuple(right), each))


def _ranked(probability: Tensor, classnames: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    values, columns = probability.topk(min(TOP, len(classnames)))
    return tuple((classnames[k], p) for k, p in zip(columns.tolist(), values.tolist(), strict=True))


def _thumbnail(dataset: Dataset, sample: Sample) -> bytes:
    try:
        image = dataset.read(sample).copy()
    except ImageError as error:
        raise UserError(f"The image {sample.source} in {dataset.where} cannot be read: {error}.") from error
    image.thumbnail((THUMBNAIL, THUMBNAIL), Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _shifts(learner: ContextLearner, tested: Sequence[Tested], features: Sequence[Features]) -> Shifts | None:
    """Over all images that were looked at, of base and new classes in one plane."""
    labels = []
    names: tuple[str, ...] = ()
    for one, seen in zip(tested, features, strict=True):
        labels.append(seen.label + len(names))
        names += one.classnames
    image = torch.cat([seen.image for seen in features]).to(learner.ctx.device)
    return shifts_of(learner, image, torch.cat(labels), names)


def _spread(items: tuple[_T, ...], count: int) -> tuple[_T, ...]:
    """``count`` of them, evenly spaced; all if there are fewer."""
    if len(items) <= count:
        return items
    return tuple(items[i * len(items) // count] for i in range(count))
