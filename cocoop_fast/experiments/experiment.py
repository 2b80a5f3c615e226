"""A whole experiment: train on one set of classes, evaluate on base and new ones, compare methods."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from cocoop_fast.clip.load import LoadedClip, load_clip
from cocoop_fast.config import DataConfig, Method, PromptConfig, RunConfig, Subset, to_mapping
from cocoop_fast.data import Dataset, load_dataset
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.data.check import check_images
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.data.few_shot_files import few_shot_sample, write_few_shot
from cocoop_fast.data.transforms import Normalize, TrainTransform
from cocoop_fast.distributed.ranks import ALONE, Ranks
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.evaluate import Features, encode_test_images, evaluate
from cocoop_fast.evaluation.feature_cache import TestFeatures
from cocoop_fast.evaluation.metrics import Metrics, harmonic_mean
from cocoop_fast.experiments.probe import fit_probe
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.methods import LinearProbe, build_model, knows_other_classes
from cocoop_fast.methods.base import PromptClassifier, PromptedCLIP
from cocoop_fast.runs import checkpoint, reference_checkpoint
from cocoop_fast.runs.checkpoint import Checkpoint
from cocoop_fast.runs.directory import RunDirectory, check_same_run, open_run, read_run
from cocoop_fast.runs.log import RunLog
from cocoop_fast.runs.recipe import resolve, with_method
from cocoop_fast.training import rng
from cocoop_fast.training.observer import EvaluationInfo, Observer, Observers, RunInfo
from cocoop_fast.training.schedule import frozen_rate, learning_rate
from cocoop_fast.training.trainer import Position, Trainer
from cocoop_fast.training.view_cache import CachedViews


@dataclass(frozen=True)
class Row:
    """One method's result. Accuracies are percentages; those that were not asked for are ``None``."""

    method: str
    seed: int
    base: float | None
    new: float | None
    h: float | None  # harmonic mean of base and new
    all: float | None
    train_seconds: float
    output_dir: Path

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.__dict__, "output_dir": str(self.output_dir)}

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Row:
        """The inverse of :meth:`to_mapping`."""
        return cls(**{**values, "output_dir": Path(values["output_dir"])})


@dataclass(frozen=True)
class Results:
    """Rows in the order in which the methods ran: the configured one first."""

    rows: tuple[Row, ...]
    output_dir: Path


def run(
    config: RunConfig,
    *,
    compare: tuple[Method, ...] = (),
    observer: Observer | None = None,
    overwrite: bool = False,
    shared: Shared | None = None,
    ranks: Ranks = ALONE,
) -> Results:
    """Train ``config``'s method, evaluate it, and do the same for the methods in ``compare``.

    With ``data.subset`` "base" the model is trained on the first half of the classes and evaluated on both
    halves (the paper's section 4.1); with "new" or "all" it is trained and evaluated on those classes. Every
    compared method has its own recipe and lives in ``output_dir/<method>``. A directory that holds an
    unfinished run of the same configuration is resumed; a finished one is read, not trained again.

    Args:
        config: as read by :mod:`cocoop_fast.config`; fields that are ``None`` are resolved here.
        compare: further methods; the configured one is left out if named again.
        observer: is told about progress.
        overwrite: discard what the output directory holds.
        shared: with other experiments of this process; ``None``: everything is loaded and encoded anew.
        ranks: that run this together. All get the results; the first alone writes, and should alone observe.

    Raises:
        UserError: anything wrong with the configuration, the data, or the output directory.
    """
    observer = observer or Observer()
    dataset = load_dataset(config.data) if shared is None else shared.dataset(config.data)
    resolved = resolve(config, dataset)
    output_dir = cast(Path, resolved.output_dir)
    others = [method for method in dict.fromkeys(compare) if method != config.prompt.method]
    plans = [resolved] + [
        resolve(with_method(config, method, output_dir / method), dataset) for method in others
    ]
    _refuse_untrainable(plans, dataset)
    material = _Material(resolved, dataset, observer, shared, ranks)
    if overwrite or any(RunDirectory(cast(Path, plan.output_dir)).results() is None for plan in plans):
        material.check([plan.prompt for plan in plans])
    if not overwrite:
        for plan in plans:
            ranks.from_first(partial(_refuse_other_images, plan, material))
    with ExitStack() as stack:
        # All directories first: that one of them cannot be used should not come out after hours of training.
        directories = [stack.enter_context(_open(plan, overwrite, ranks)) for plan in plans]
        rows = [
            _run_method(plan, directory, material, observer, ranks)
            for plan, directory in zip(plans, directories, strict=True)
        ]
        if ranks.is_first:
            directories[0].write_results(
                {**(directories[0].results() or {}), "rows": [row.to_mapping() for row in rows]}
            )
    return Results(tuple(rows), output_dir)


def _open(config: RunConfig, overwrite: bool, ranks: Ranks) -> AbstractContextManager[RunDirectory]:
    """The first rank has the run directory to itself; the others only know where it is."""
    if ranks.is_first:
        return open_run(config, overwrite=overwrite)
    return nullcontext(RunDirectory(cast(Path, config.output_dir)))


def _refuse_other_images(plan: RunConfig, material: _Material) -> None:
    """A run that is there already, finished or not, must be of these images: before anything in its directory changes."""
    path = cast(Path, plan.output_dir)
    newest = checkpoint.load_newest(RunDirectory(path).checkpoints)
    if newest is None:
        return
    check_same_run(newest.config, to_mapping(plan), path)
    train = select_classes(material.drawn, plan.data.subset)
    # Images that were left out as unreadable are not in the fingerprint; nothing is read here to find them again.
    same_images = plan.data.skip_bad_images or newest.data_fingerprint == _fingerprint(train)
    _check_same_images(newest.classnames == list(train.classnames) and same_images, train, path)


def _check_same_images(same: bool, train: Dataset, path: Path) -> None:
    if not same:
        raise UserError(
            f"The training images in {train.where} are not those that the run in {path} began with; restore them, "
            "choose another output directory, or use --overwrite.",
            exit_status=1,
        )


def _refuse_untrainable(plans: Sequence[RunConfig], dataset: Dataset) -> None:
    learners = [plan.prompt.method for plan in plans if plan.prompt.method != "zeroshot"]
    if learners and dataset.test_only:
        raise UserError(
            f"{dataset.name} has test images only, so {learners[0]} cannot be trained on it; train on another data set "
            "and evaluate there, or use --method zeroshot."
        )


def evaluate_run(
    run_dir: Path,
    *,
    subset: Subset | None = None,
    reference_checkpoint: Path | None = None,
    observer: Observer | None = None,
    data: DataConfig | None = None,
    template: str | None = None,
    shared: Shared | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Metrics]:
    """Evaluate what a run has learned, on its data set or another one.

    Args:
        run_dir: what :func:`run` wrote; its newest checkpoint is used.
        subset: "base", "new" or "all" (all classes together, also for a model trained on half of them);
            ``None``: those the run itself is evaluated on.
        reference_checkpoint: learned parameters from the reference implementation (``model.pth.tar-N`` or its folder)
            instead of the run's own.
        observer: is told about progress.
        data: another data set.
        template: with ``data``, the prompt of zero-shot CLIP there; ``None``: that data set's own.
        shared, ranks: as for :func:`run`.

    Returns:
        Metrics by subset.

    Raises:
        UserError: no run there, or damaged files or images.
    """
    config, newest = ranks.from_first(lambda: read_run(run_dir))
    if data is not None:
        config = replace(config, data=data, prompt=replace(config.prompt, template=template))
    if reference_checkpoint is not None:
        return evaluate_reference(config, reference_checkpoint, subset=subset, observer=observer, ranks=ranks)
    trained = tuple(newest.classnames)
    return _evaluate(config, newest.parameters, str(run_dir), subset, observer, shared, trained, ranks)


def evaluate_reference(
    config: RunConfig,
    path: Path,
    *,
    subset: Subset | None = None,
    observer: Observer | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Metrics]:
    """Evaluate a checkpoint that the reference implementation wrote.

    Args:
        config: the method, model and data that it was trained with.
        path: ``model.pth.tar-N`` or its folder. It is read without running any code in it.
        subset, observer, ranks: as for :func:`evaluate_run`.

    Raises:
        UserError: a file that cannot be read, or was trained with another method or model.
    """
    loaded = reference_checkpoint.load(path)
    return _evaluate(config, loaded.parameters, str(loaded.path), subset, observer, ranks=ranks)


class _Material:
    """What the methods of one experiment share, made when first needed: images, CLIP, test features."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        observer: Observer,
        shared: Shared | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._config = config
        self._dataset = dataset
        self._observer = observer
        self._shared = shared
        self._features: dict[str, Features] = {}

    @cached_property
    def clip(self) -> LoadedClip:
        config = self._config.model
        config = replace(config, device=self._ranks.own_device(config.device))
        return load_clip(config) if self._shared is None else self._shared.clip(config)

    @cached_property
    def drawn(self) -> Dataset:
        """All classes, few-shot sampled."""
        return few_shot_sample(self._dataset, self._config.data, self._config.seed, self._observer.on_message)

    @cached_property
    def sampled(self) -> Dataset:
        """The same with only the images that are used, checked. Validation images are not used."""
        sampled = self.drawn
        subset = self._config.data.subset
        used = select_classes(sampled, subset)
        shown = {sample.source for sample in used.train}
        tested = {name for one in self.subsets for name in select_classes(sampled, one).classnames}
        cached = self._cached()
        if self._shared is None:
            test = tuple(sample for sample in sampled.test if sample.classname in tested)
        else:  # features of all classes are made at once, and images with features have been read before
            test = sampled.test if cached is None else ()
        checked = check_images(
            sampled.with_splits(
                train=tuple(sample for sample in sampled.train if sample.source in shown), val=(), test=test
            ),
            skip_bad=self._config.data.skip_bad_images,
            on_message=self._observer.on_message,
        )
        return checked if cached is None else checked.with_splits(test=cached.samples)

    def _cached(self) -> TestFeatures | None:
        """Features from earlier runs; not if they lack images that may not be left out here."""
        if self._shared is None:
            return None
        found = self._shared.features.find(self.clip, self._dataset)
        complete = found is not None and len(found.samples) == len(self._dataset.test)
        return found if complete or self._config.data.skip_bad_images else None

    def check(self, prompts: list[PromptConfig]) -> None:
        """Find whatever is wrong with model, images, prompts and class names before anything is written."""
        for prompt in prompts:
            for subset in self.tested(prompt):
                self.model(prompt, subset)

    def model(self, prompt: PromptConfig, subset: Subset) -> PromptedCLIP:
        """An untrained model over one set of classes."""
        classnames = list(self.classes(subset).classnames)
        return build_model(
            prompt,
            classnames,
            self.clip,
            backend=self._config.model.backend,
            memory_budget=self._config.model.memory_budget,
            prune_mass=self._config.optim.prune_mass,
        )

    @property
    def subsets(self) -> tuple[Subset, ...]:
        """Sets of classes to evaluate on."""
        return ("base", "new") if self._config.data.subset == "base" else (self._config.data.subset,)

    def tested(self, prompt: PromptConfig) -> tuple[Subset, ...]:
        """Those of them that a method can be evaluated on."""
        return self.subsets if knows_other_classes(prompt) else (self._config.data.subset,)

    @property
    def validation(self) -> Dataset:
        """The few-shot validation images of the classes that are trained on; none if they are the test images."""
        classes = select_classes(self.drawn, self._config.data.subset)
        return classes.with_splits(train=(), test=(), val=() if classes.val_is_test else classes.val)

    def classes(self, subset: Subset) -> Dataset:
        """The data of one set of classes, relabelled."""
        return select_classes(self.sampled, subset)

    def features(
        self, subset: Subset, model: PromptClassifier, progress: Callable[[int, int], None]
    ) -> Features:
        """Test features of one set of classes; every method has the same image encoder. Ranks have a share each."""
        if subset not in self._features:
            encode = partial(
                encode_test_images,
                model,
                self.clip,
                batch_size=self._config.eval_batch_size,
                workers=self._config.data.workers,
                progress=progress,
            )
            classes = self.classes(subset)
            own = tuple(self._ranks.everyone.share(classes.test))
            if self._shared is None:
                self._features[subset] = encode(classes.with_splits(test=own))
            else:
                everything = self._shared.features.find_or_make(
                    self.clip,
                    self._dataset,
                    self.sampled.test,
                    lambda samples: encode(self._dataset.with_splits(test=samples)).image,
                )
                self._features[subset] = everything.select(own, self.clip.device)
        return self._features[subset]


def _run_method(
    config: RunConfig, directory: RunDirectory, material: _Material, observer: Observer, ranks: Ranks
) -> Row:
    method = config.prompt.method
    finished = ranks.from_first(directory.results)
    if finished is not None:
        observer.on_message(f"The {method} run in {directory.path} is finished; its results are shown.")
        return Row.from_mapping(finished["rows"][0])
    if ranks.is_first:
        next_rate = partial(learning_rate, config.optim) if config.reference_compat else None
        log = RunLog(directory.path, config.print_freq, config.data.subset, next_rate)
        observer = Observers(log, observer)
    train = material.classes(config.data.subset)
    rng.seed_everything(config.seed)
    model = material.model(config.prompt, config.data.subset)
    optimizer, seconds = _train(config, directory, model, train, material, observer, ranks)
    learned = ranks.from_first(lambda: checkpoint.learned_parameters(model))
    subsets = material.tested(config.prompt)
    metrics = _measure(config, material, learned, str(directory.path), subsets, observer, ranks)
    row = _row(config, metrics, seconds)
    if ranks.is_first:
        if "ctx" in learned:
            accuracy = metrics[config.data.subset].accuracy
            reference_checkpoint.save(directory.prompt_learner, model, config.optim, optimizer, accuracy)
        evaluations = {subset: one.summary() for subset, one in metrics.items()}
        directory.write_results({"rows": [row.to_mapping()], "evaluations": evaluations})
    observer.on_run_end(directory.path)
    return row


def _train(
    config: RunConfig,
    directory: RunDirectory,
    model: PromptClassifier,
    train: Dataset,
    material: _Material,
    observer: Observer,
    ranks: Ranks,
) -> tuple[dict[str, Any], float]:
    """Train from the newest checkpoint, or from the start. Returns the optimizer's state and the seconds."""
    mapping, clip = to_mapping(config), material.clip
    size = sum(parameter.numel() for parameter in model.prompt_learner.parameters())
    fingerprint = _fingerprint(train)
    ranks.check_alike("their configuration", mapping)
    ranks.check_alike("the training images", fingerprint)
    batch_size = cast(int, config.optim.batch_size)
    if config.optim.epochs:
        ranks = ranks.arranged(config.model.shard, min(batch_size, len(train.train)))
    batches = TrainBatches(
        train,
        train.train,
        TrainTransform(
            clip.image_size,
            cast("tuple[float, float]", config.augment.crop_scale),
            cast(float, config.augment.flip),
            Normalize(clip.mean, clip.std),
        ),
        batch_size,
        config.seed,
        workers=config.data.workers,
        pin_memory=clip.device.type == "cuda",
        share=(ranks.images.index, ranks.images.size),
    )
    views = config.data.cache_views
    features = (
        CachedViews(model, clip, batches, views, directory.views, observer.on_message) if views else None
    )
    trainer = Trainer(
        model,
        batches,
        config.optim,
        precision=clip.precision,
        cuda_graph=config.model.cuda_graph,
        observer=observer,
        ranks=ranks,
        features=features,
    )
    resumed = ranks.from_first(lambda: checkpoint.load_newest(directory.checkpoints, observer.on_message))
    if resumed is not None:
        check_same_run(resumed.config, mapping, directory.checkpoints)
        same = resumed.classnames == list(train.classnames) and resumed.data_fingerprint == fingerprint
        _check_same_images(same, train, directory.path)
        _restore(trainer, resumed, str(directory.checkpoints))
        if config.reference_compat and trainer.step:
            trainer.rate = partial(frozen_rate, config.optim, resumed_in=resumed.epoch)
    observer.on_run_start(
        RunInfo(
            config=config,
            output_dir=directory.path,
            classnames=train.classnames,
            parameters=size,
            train_images=len(train.train),
            steps_per_epoch=len(batches),
            epochs=trainer.epochs,
            precision=clip.precision,
            device=str(clip.device),
            first_step=trainer.step,
        )
    )

    def save() -> None:
        if not ranks.is_first:
            return
        state = Checkpoint(
            config=mapping,
            classnames=list(train.classnames),
            data_fingerprint=fingerprint,
            parameters=checkpoint.learned_parameters(model),
            optimizer=trainer.optimizer.state_dict(),
            scaler=trainer.scaler.state_dict(),
            rng=rng.capture(),
            epoch=trainer.position.epoch,
            batch=trainer.position.batch,
            step=trainer.step,
            seconds=trainer.seconds,
        )
        observer.on_checkpoint(checkpoint.save(directory.checkpoints, state))

    if resumed is None:
        if config.data.shots and not train.test_only and ranks.is_first:
            write_few_shot(directory.few_shot, material.drawn, config.data.shots, config.seed)
        if isinstance(model, LinearProbe):
            trainer.seconds = fit_probe(model, clip, train, material.validation, config, observer)
        save()  # a directory that cannot be written is noticed now, and zero-shot CLIP has its class names
    trainer.fit(save=save, save_every=config.checkpoint_steps)
    observer.on_training_end(trainer.seconds)
    return trainer.optimizer.state_dict(), trainer.seconds


def _restore(trainer: Trainer, state: Checkpoint, where: str) -> None:
    checkpoint.load_parameters(trainer.model, state.parameters, where)
    trainer.optimizer.load_state_dict(state.optimizer)
    trainer.scaler.load_state_dict(state.scaler)
    trainer.position = Position(state.epoch, state.batch)
    trainer.seconds = state.seconds
    rng.restore(state.rng)


def _evaluate(
    config: RunConfig,
    parameters: dict[str, Tensor],
    where: str,
    subset: Subset | None,
    observer: Observer | None,
    shared: Shared | None = None,
    trained: tuple[str, ...] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Metrics]:
    observer = observer or Observer()
    if shared is None:
        dataset = load_dataset(config.data).with_splits(train=(), val=())
    else:
        dataset = shared.test_set(config.data)
    config = resolve(config, dataset)
    if subset is not None:
        config = replace(config, data=replace(config.data, subset=subset))
    material = _Material(config, dataset, observer, shared, ranks)
    subsets = material.tested(config.prompt) if subset is None else (subset,)
    if trained is not None and not knows_other_classes(config.prompt):
        for one in subsets:
            if select_classes(dataset, one).classnames != trained:
                raise UserError(
                    f"What this {config.prompt.method} model learned belongs to the {len(trained)} classes that it "
                    f"was trained on, so it cannot be evaluated on {one} classes of {dataset.name}."
                )
    return _measure(config, material, parameters, where, subsets, observer, ranks)


def _measure(
    config: RunConfig,
    material: _Material,
    parameters: dict[str, Tensor],
    where: str,
    subsets: tuple[Subset, ...],
    observer: Observer,
    ranks: Ranks,
) -> dict[str, Metrics]:
    """Carry what is learned over to each set of classes, and evaluate there."""
    metrics: dict[str, Metrics] = {}
    for subset in subsets:
        model = material.model(config.prompt, subset)
        checkpoint.load_parameters(model, parameters, where)
        images = len(material.classes(subset).test)
        observer.on_evaluation_start(config.prompt.method, subset, images)
        start = time.perf_counter()
        # Encoding images and classifying them are one job of two halves to an observer.
        features = material.features(
            subset, model, lambda done, n: observer.on_evaluation_progress(done // 2, n)
        )
        metrics[subset] = evaluate(
            model,
            features,
            model.n_classes,
            batch_size=config.eval_batch_size,
            precision=material.clip.precision,
            progress=lambda done, n: observer.on_evaluation_progress((n + done) // 2, n),
            ranks=ranks,
        )
        observer.on_evaluation_end(
            EvaluationInfo(config.prompt.method, subset, metrics[subset], time.perf_counter() - start)
        )
    return metrics


def _row(config: RunConfig, metrics: dict[str, Metrics], seconds: float) -> Row:
    accuracy = {subset: one.accuracy for subset, one in metrics.items()}
    if config.reference_compat:  # whose tables are made from its logs
        accuracy = {subset: round(value, 1) for subset, value in accuracy.items()}
    base, new = accuracy.get("base"), accuracy.get("new")
    return Row(
        method=config.prompt.method,
        seed=config.seed,
        base=base,
        new=new,
        h=harmonic_mean(base, new) if base is not None and new is not None else None,
        all=accuracy.get("all"),
        train_seconds=seconds,
        output_dir=cast(Path, config.output_dir),
    )


def _fingerprint(dataset: Dataset) -> str:
    lines = "\n".join(f"{sample.label}\t{sample.source}" for sample in dataset.train)
    return hashlib.sha256(lines.encode()).hexdigest()
