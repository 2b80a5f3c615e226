"""The training of one method in its run directory: begun or resumed, logged and saved."""

from __future__ import annotations

import hashlib
import time
from functools import partial
from pathlib import Path

from cocoop_fast.config import ResolvedConfig, to_mapping
from cocoop_fast.data import Dataset
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.data.content import glances, size
from cocoop_fast.data.few_shot_files import write_few_shot
from cocoop_fast.data.transforms import Normalize, TrainTransform
from cocoop_fast.data.workers import reading_processes
from cocoop_fast.errors import UserError
from cocoop_fast.experiments.material import Material
from cocoop_fast.methods import LinearProbe
from cocoop_fast.runs import checkpoint
from cocoop_fast.runs.checkpoint import Checkpoint
from cocoop_fast.runs.directory import RunDirectory
from cocoop_fast.runs.log import RunLog
from cocoop_fast.training import rng
from cocoop_fast.training.observer import Observer, Observers, RunInfo
from cocoop_fast.training.schedule import frozen_rate, learning_rate
from cocoop_fast.training.trainer import Position, Trainer
from cocoop_fast.training.view_cache import CachedViews


class TrainingRun:
    """A model and its trainer, seeded anew. Nothing is written before :meth:`begin`.

    Args:
        config: of the method.
        directory: of its run, which is open.
        material: of the experiment; its observer is told about progress, and so is the run's log.

    Attributes:
        model: over the classes that are trained on.
        trainer: of the model.
        observer: everybody who is told.

    Raises:
        UserError: ranks differ in configuration or images, or cannot share the work.
    """

    def __init__(self, config: ResolvedConfig, directory: RunDirectory, material: Material) -> None:
        self.config = config
        self.directory = directory
        self.observer: Observer = material.observer
        self._material = material
        self._ranks = material.ranks
        if self._ranks.is_first:
            next_rate = partial(learning_rate, config.optim) if config.reference_compat else None
            log = RunLog(
                directory.path, config.print_freq, config.data.subset, next_rate, directory.refuse_gone
            )
            self.observer = Observers(log, material.observer)
        self._train = material.classes(config.data.subset)
        self._mapping, self._fingerprint = to_mapping(config), fingerprint(self._train)
        self._ranks.check_alike("their configuration", self._mapping)
        self._ranks.check_alike("the training images", self._fingerprint)
        rng.seed_everything(config.seed)
        self.model = material.shared.model(config, self._train.classnames)
        self.trainer = self._make_trainer()

    def _make_trainer(self) -> Trainer:
        config, clip, ranks = self.config, self._material.clip, self._ranks
        optim, data, train = config.optim, config.data, self._train
        if optim.epochs:
            ranks = ranks.arranged(config.model.shard, min(optim.batch_size, len(train.train)))
        augment = config.augment
        batches = TrainBatches(
            train,
            train.train,
            TrainTransform(
                clip.image_size,
                augment.crop_scale,
                augment.flip,
                Normalize(clip.mean, clip.std),
                clip.interpolation,
            ),
            optim.batch_size,
            config.seed,
            workers=reading_processes(data.workers, clip.device),
            pin_memory=clip.device.type == "cuda",
            share=(ranks.images.index, ranks.images.size),
        )
        features = None
        if data.cache_views:
            folder, say = self.directory.views, self.observer.on_message
            features = CachedViews(self.model, clip, batches, data.cache_views, folder, say)
        return Trainer(
            self.model,
            batches,
            optim,
            precision=clip.precision,
            cuda_graph=config.model.cuda_graph,
            observer=self.observer,
            ranks=ranks,
            features=features,
        )

    def begin(self) -> None:
        """Go on from the newest checkpoint, or write the beginning of a run.

        Raises:
            UserError: the checkpoint is of other images, or the directory cannot be written.
        """
        folder, config, trainer = self.directory.checkpoints, self.config, self.trainer
        newest = self._ranks.from_first(lambda: checkpoint.load_newest(folder, self.observer.on_message))
        if newest is not None:
            refuse_other_images(newest, self._train, self.directory.path)
            checkpoint.load_parameters(trainer.model, newest.parameters, str(folder))
            trainer.optimizer.load_state_dict(newest.optimizer)
            trainer.scaler.load_state_dict(newest.scaler)
            if trainer.average is not None:
                trainer.average.load_state_dict(newest.average)
            trainer.position = Position(newest.epoch, newest.batch)
            trainer.seconds = newest.seconds
            rng.restore(newest.rng)
            if config.reference_compat and trainer.step:
                trainer.rate = partial(frozen_rate, config.optim, resumed_in=newest.epoch)
        self.observer.on_run_start(
            RunInfo(
                config=config,
                output_dir=self.directory.path,
                classnames=self._train.classnames,
                other_classes=self._material.other_classes,
                parameters=sum(one.numel() for one in self.model.prompt_learner.parameters()),
                train_images=len(self._train.train),
                steps_per_epoch=len(trainer.batches),
                epochs=config.optim.epochs,
                precision=self._material.clip.precision,
                device=str(self._material.clip.device),
                notes=(*filter(None, [self._material.clip.assumed]), *self._train.notes),
                first_step=trainer.step,
                class_images=self._train.images_of_classes(self._train.train),
            )
        )
        if newest is not None:
            return
        if config.data.shots and not self._train.test_only and self._ranks.is_first:
            write_few_shot(self.directory.few_shot, self._material.drawn, config.data.shots, config.seed)
        if isinstance(self.model, LinearProbe):
            trainer.seconds = self._fit_probe(self.model)
        self.save()  # a directory that cannot be written is noticed now, and zero-shot CLIP has its class names

    def _fit_probe(self, model: LinearProbe) -> float:
        """Fit a linear probe on features of images that are not augmented. Returns the seconds it took."""
        start = time.perf_counter()
        seen = self._material.encode(model, self._train.with_splits(test=self._train.train))
        validation = self._material.validation
        if validation.val:  # they choose C
            held_out = self._material.encode(model, validation.with_splits(test=validation.val))
            fit = model.fit(seen.image, seen.label, held_out.image, held_out.label)
            how = f"{fit.accuracy:.1f} % of {len(validation.val)} validation images are right"
        else:
            fit = model.fit(seen.image, seen.label)
            how = "CLIP's own choice, for want of validation images"
        self.observer.on_message(f"Linear probe: C = {fit.strength:.3g} ({how}).")
        return time.perf_counter() - start

    def state(self) -> Checkpoint:
        """Where the run stands."""
        trainer = self.trainer
        return Checkpoint(
            config=self._mapping,
            classnames=list(self._train.classnames),
            other_classes=list(self._material.other_classes),
            data_fingerprint=self._fingerprint,
            parameters=checkpoint.learned_parameters(self.model),
            optimizer=trainer.optimizer.state_dict(),
            scaler=trainer.scaler.state_dict(),
            average=trainer.average.state_dict() if trainer.average is not None else {},
            rng=rng.capture(),
            epoch=trainer.position.epoch,
            batch=trainer.position.batch,
            step=trainer.step,
            seconds=trainer.seconds,
        )

    def save(self) -> None:
        """Write a checkpoint; the first rank does so for all."""
        if self._ranks.is_first:
            try:
                self.directory.refuse_gone()
                path = checkpoint.save(self.directory.checkpoints, self.state())
            except UserError as error:
                self.directory.refuse_gone(error.__cause__)  # it may have gone just now
                raise
            self.observer.on_checkpoint(path)


def fingerprint(dataset: Dataset) -> str:
    """A digest of the training images, in order: labels, names below the root, and what the files hold at a glance.

    Of the test images' files the sizes enter, so that a folder of other versions of them is noticed.
    """
    root = dataset.folder
    digest = hashlib.sha256()
    held = [""] * len(dataset.train)
    if root is not None:
        held = glances(root / str(sample.source) for sample in dataset.train)
        for sample in dataset.test:
            digest.update(f"{sample.source}\t{size(root / str(sample.source))}\n".encode())
    for sample, content in zip(dataset.train, held, strict=True):
        digest.update(f"{sample.label}\t{sample.source}\t{content}\n".encode())
    return digest.hexdigest()


def refuse_other_images(
    state: Checkpoint, train: Dataset, path: Path, *, classes_alone: bool = False
) -> None:
    """A run that is there already, finished or not, must be of these images.

    Raises:
        UserError: it is not.
    """
    same = state.classnames == list(train.classnames)
    if not same or not (classes_alone or state.data_fingerprint == fingerprint(train)):
        raise UserError(
            f"The images in {train.where} are not those that the run in {path} began with; restore them, choose another "
            "output directory, or use --overwrite.",
            exit_status=1,
        )
