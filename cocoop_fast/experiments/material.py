"""What the methods of one experiment share: images, CLIP, features of test images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from cocoop_fast.clip.load import LoadedClip
from cocoop_fast.config import PromptConfig, ResolvedConfig, ResolvedPrompt, Subset
from cocoop_fast.data import Dataset, Sample
from cocoop_fast.data.check import check_images
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.data.few_shot_files import few_shot_sample
from cocoop_fast.data.workers import reading_processes
from cocoop_fast.distributed.ranks import ALONE, Ranks
from cocoop_fast.evaluation.evaluate import Features, Progress, encode_test_images, evaluate
from cocoop_fast.evaluation.feature_cache import TestFeatures
from cocoop_fast.evaluation.metrics import Metrics
from cocoop_fast.evaluation.shortlist import ShortlistClassifier, evaluate_by_shortlist
from cocoop_fast.experiments.shared import Shared, has_own_images, recorder
from cocoop_fast.methods import knows_other_classes
from cocoop_fast.methods.base import ImageClassifier, PromptedCLIP
from cocoop_fast.runs.checkpoint import load_parameters
from cocoop_fast.training.observer import EvaluationInfo, Observer
from cocoop_fast.variants import name_of


class Material:
    """Images, CLIP and test features, each made when it is first needed.

    Args:
        config: of the experiment; the methods differ from it in their prompt and recipe alone.
        dataset: all images of all classes.
        shared: with other experiments.
        observer: is told about images.
        ranks: that run the experiment together.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        dataset: Dataset,
        shared: Shared,
        observer: Observer,
        ranks: Ranks = ALONE,
    ) -> None:
        device = ranks.own_device(config.model.device)
        self.config = replace(config, model=replace(config.model, device=device))
        self.dataset = dataset
        self.shared = shared
        self.observer = observer
        self.ranks = ranks
        self._features: dict[Subset, Features] = {}

    @property
    def clip(self) -> LoadedClip:
        return self.shared.clip(self.config.model)

    def tell_what_is_used(self) -> None:
        """Say which CLIP it is, and how the data were understood."""
        own = has_own_images(self.config)
        self.shared.tell_of_model(self.config.model, self.observer.on_message, own_images=own)
        for note in self.dataset.notes:
            self.observer.on_message(note)

    @cached_property
    def drawn(self) -> Dataset:
        """All classes, few-shot sampled."""
        return few_shot_sample(self.dataset, self.config.data, self.config.seed, self.observer.on_message)

    @cached_property
    def sampled(self) -> Dataset:
        """The same with only the images that are used, checked. Validation images are not used."""
        drawn, cached = self.drawn, self._cached()
        if cached is not None:  # images with features have been read before
            test: tuple[Sample, ...] = ()
        elif self.shared.features is not None:  # features of all classes are made at once
            test = drawn.test
        else:
            test = _kept(drawn.test, [select_classes(drawn, subset).test for subset in self.subsets])
        train = _kept(drawn.train, [select_classes(drawn, self.config.data.subset).train])
        checked = check_images(
            drawn.with_splits(train=train, val=(), test=test),
            skip_bad=self.config.data.skip_bad_images,
            on_message=self.observer.on_message,
        )
        return checked if cached is None else checked.with_splits(test=cached.samples)

    def _cached(self) -> TestFeatures | None:
        """Features from earlier runs; not if they lack images that may not be left out here."""
        if self.shared.features is None:
            return None
        found = self.shared.features.find(self.clip, self.dataset)
        complete = found is not None and len(found.samples) == len(self.dataset.test)
        return found if complete or self.config.data.skip_bad_images else None

    @property
    def validation(self) -> Dataset:
        """The few-shot validation images of the classes that are trained on; none if they are the test images."""
        classes = select_classes(self.drawn, self.config.data.subset)
        return classes.with_splits(train=(), test=(), val=() if classes.val_is_test else classes.val)

    @property
    def subsets(self) -> tuple[Subset, ...]:
        """Sets of classes to evaluate on."""
        return ("base", "new") if self.config.data.subset == "base" else (self.config.data.subset,)

    @property
    def other_classes(self) -> tuple[str, ...]:
        """Classes of the data set that are not trained on."""
        match self.config.data.subset:
            case "base":
                return select_classes(self.dataset, "new").classnames
            case "new":
                return select_classes(self.dataset, "base").classnames
        return ()

    def tested(self, prompt: PromptConfig) -> tuple[Subset, ...]:
        """Those of them that a method can be evaluated on."""
        return self.subsets if knows_other_classes(prompt) else (self.config.data.subset,)

    def classes(self, subset: Subset) -> Dataset:
        """The data of one set of classes, relabelled."""
        return select_classes(self.sampled, subset)

    def model(self, prompt: ResolvedPrompt, subset: Subset) -> PromptedCLIP:
        """An untrained model over one set of classes."""
        return self.shared.model(replace(self.config, prompt=prompt), self.classes(subset).classnames)

    def encode(self, model: ImageClassifier, dataset: Dataset, progress: Progress | None = None) -> Features:
        """Features of a data set's test images, by the configuration's batch size and workers."""
        config = self.config
        return encode_test_images(
            model,
            self.clip,
            dataset,
            batch_size=config.eval_batch_size,
            workers=reading_processes(config.data.workers, self.clip.device),
            progress=progress,
        )

    def evaluate(
        self,
        of: ResolvedConfig,
        parameters: dict[str, Tensor],
        where: str,
        observer: Observer,
        subsets: Sequence[Subset],
        shortlist: int | None = None,
    ) -> dict[Subset, Metrics]:
        """Carry what a method learned, parameters by name from ``where``, over to each set of classes; evaluate there, by
        shortlists of so many classes or among all. ``of`` is the method's own configuration."""
        method = name_of(of)
        metrics: dict[Subset, Metrics] = {}
        for subset in subsets:
            model = self.model(of.prompt, subset)
            load_parameters(model, parameters, where)
            shortlisted = None if shortlist is None else ShortlistClassifier(model, shortlist)
            observer.on_evaluation_start(method, subset, len(self.classes(subset).test))
            start = time.perf_counter()
            # Encoding images and classifying them are one job of two halves to an observer.
            features = self._features_of(
                subset, model, lambda done, n: observer.on_evaluation_progress(done // 2, n)
            )
            how: dict[str, Any] = {
                "batch_size": self.config.eval_batch_size,
                "precision": self.clip.precision,
                "progress": lambda done, n: observer.on_evaluation_progress((n + done) // 2, n),
                "ranks": self.ranks,
            }
            if shortlisted is None:
                metrics[subset] = evaluate(
                    model,
                    features,
                    model.n_classes,
                    **how,
                    record=recorder(self.clip, self.config.model),
                    on_message=observer.on_message,
                )
            else:
                seed = self.config.seed
                metrics[subset] = evaluate_by_shortlist(shortlisted, features, seed=seed, **how)
            seconds = time.perf_counter() - start
            observer.on_evaluation_end(EvaluationInfo(method, subset, metrics[subset], seconds))
        return metrics

    def _features_of(self, subset: Subset, model: ImageClassifier, progress: Progress) -> Features:
        """Test features of one set of classes; every method has the same image encoder. Ranks have a share each."""
        if subset not in self._features:
            classes = self.classes(subset)
            own = tuple(self.ranks.everyone.share(classes.test))
            if self.shared.features is None:
                self._features[subset] = self.encode(model, classes.with_splits(test=own), progress)
            else:
                everything = self.shared.features.find_or_make(
                    self.clip,
                    self.dataset,
                    self.sampled.test,
                    lambda samples: (
                        self.encode(model, self.dataset.with_splits(test=samples), progress).image
                    ),
                )
                self._features[subset] = everything.select(own, self.clip.device)
        return self._features[subset]


def _kept(samples: tuple[Sample, ...], used: Iterable[tuple[Sample, ...]]) -> tuple[Sample, ...]:
    """Those whose images are among the used ones, which may be labelled otherwise."""
    sources = {sample.source for some in used for sample in some}
    return tuple(sample for sample in samples if sample.source in sources)
