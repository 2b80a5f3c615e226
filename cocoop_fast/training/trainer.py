"""The training loop: frozen image features, one loss, one optimizer step, and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cocoop_fast.config import OptimConfig
from cocoop_fast.data.batches import Batch, TrainBatches
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.classifier import PromptClassifier
from cocoop_fast.evaluation.evaluate import autocast
from cocoop_fast.training.observer import EpochInfo, Observer, StepInfo
from cocoop_fast.training.schedule import learning_rate

# Images are encoded this many at a time, ahead of the steps that use them: the image encoder is frozen, so
# its features do not depend on the steps in between, and batches of one would leave it mostly idle.
_ENCODED_AT_ONCE = 16


class Position(NamedTuple):
    """The next thing to do: batch ``batch``, counted from 0, of the 1-based ``epoch``."""

    epoch: int = 1
    batch: int = 0


class Trainer:
    """Trains the prompt learner of a model; works for any model of the interface below.

    The model has ``prompt_learner`` (its parameters are all that is learned), ``image_encoder``, ``dtype``
    and ``loss_and_logits(image_features (B, E), label (B,)) -> (scalar loss, logits (B, K))``.

    Precision: "fp32" computes in the model's dtype as it is; so do "fp16" and "bf16", with the model already
    converted, parameters and momentum included and without loss scaling, as in the reference; "amp" runs under
    autocast (float16 with loss scaling on a GPU, bfloat16 on a CPU).

    Args:
        model: on its device.
        batches: what to train on.
        optim: resolved; ``epochs`` is set.
        precision: fp32, fp16, bf16 or amp.
        observer: is told about each step.
    """

    def __init__(
        self,
        model: PromptClassifier,
        batches: TrainBatches,
        optim: OptimConfig,
        *,
        precision: str = "fp32",
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.optim = optim
        self.observer = observer or Observer()
        parameters = [p.requires_grad_(True) for p in model.prompt_learner.parameters()]
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.SGD(
            [
                {"params": parameters}
            ],  # a group may be empty, a bare list may not: zero-shot CLIP learns nothing
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
        )
        self.precision = precision
        scaled = precision == "amp" and self.device.type == "cuda"  # bfloat16 needs no loss scaling
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.position = Position()
        self.seconds = 0.0  # spent training, earlier processes included

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return (self.position.epoch - 1) * len(self.batches) + self.position.batch

    @property
    def epochs(self) -> int:
        return self.optim.epochs or 0

    def fit(self, *, save: Callable[[], None] | None = None, save_every: int = 0) -> None:
        """Train from where the run stands to its end.

        Args:
            save: called between steps, after each epoch and each ``save_every`` steps of the run.
            save_every: 0: after epochs only.

        Raises:
            UserError: the loss is infinite or not a number; the message names the step and its images.
        """
        self.model.prompt_learner.train()
        clock = _Clock(self.seconds, self.step)
        while self.position.epoch <= self.epochs:
            self._epoch(clock, save, save_every)
            if save is not None:
                save()

    def _epoch(self, clock: _Clock, save: Callable[[], None] | None, save_every: int) -> None:
        epoch, first_batch = self.position
        n_batches = len(self.batches)
        lr = learning_rate(self.optim, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.observer.on_epoch_start(epoch, self.epochs, first_batch, n_batches)
        losses, hits, images = 0.0, 0, 0
        epoch_started = mark = time.perf_counter()
        for batch, features in self._features(epoch, first_batch):
            data_seconds = time.perf_counter() - mark
            label = batch.label.to(self.device, non_blocking=True)
            loss, logits = self._step(features, label, batch)
            correct = int((logits.argmax(dim=1) == label).sum())
            losses, hits, images = losses + loss, hits + correct, images + len(label)
            batch_done = self.position.batch + 1
            self.position = Position(epoch, batch_done) if batch_done < n_batches else Position(epoch + 1)
            self.seconds = clock.total()
            steps_per_second = clock.rate(self.step)
            self.observer.on_step(
                StepInfo(
                    step=self.step,
                    total_steps=self.epochs * n_batches,
                    epoch=epoch,
                    epochs=self.epochs,
                    batch=batch_done,
                    batches=n_batches,
                    loss=loss,
                    accuracy=100.0 * correct / len(label),
                    lr=lr,
                    seconds=time.perf_counter() - mark,
                    data_seconds=data_seconds,
                    images_per_second=steps_per_second * len(label),
                    eta_seconds=(self.epochs * n_batches - self.step) / steps_per_second,
                )
            )
            mark = time.perf_counter()
            if save is not None and save_every and self.step % save_every == 0 and batch_done < n_batches:
                save()
        seconds = time.perf_counter() - epoch_started
        self.observer.on_epoch_end(
            EpochInfo(
                epoch=epoch,
                epochs=self.epochs,
                loss=losses / (n_batches - first_batch),
                accuracy=100.0 * hits / images,
                lr=lr,
                seconds=seconds,
                images_per_second=images / seconds,
            )
        )

    def _step(self, features: Tensor, label: Tensor, batch: Batch) -> tuple[float, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device):
            loss, logits = self.model.loss_and_logits(features, label)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"The loss became {value} at step {self.step + 1} (epoch {self.position.epoch}), on "
                f"{self.batches.describe(batch)}; try a lower learning rate, or precision fp32.",
                exit_status=1,
            )
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value, logits

    def _features(self, epoch: int, first_batch: int) -> Iterator[tuple[Batch, Tensor]]:
        """The epoch's batches with their image features (B, E), encoded several batches at once.

        Groups are counted from the epoch's start: a resumed run encodes the same groups as an uninterrupted
        one, and so gets the same bits.
        """
        size = max(1, _ENCODED_AT_ONCE // self.batches.batch_size)
        first_of_group = first_batch - first_batch % size
        group: list[Batch] = []
        for number, batch in enumerate(self.batches.epoch(epoch, first_of_group), first_of_group):
            group.append(batch)
            if len(group) == size or number + 1 == len(self.batches):
                skip = max(0, first_batch - (number + 1 - len(group)))
                yield from list(zip(group, self._encode(group), strict=True))[skip:]
                group = []

    @torch.no_grad()
    def _encode(self, group: list[Batch]) -> tuple[Tensor, ...]:
        image = torch.cat([batch.image for batch in group])
        with autocast(self.precision, self.device):
            features = self.model.image_encoder(image.to(self.device, self.model.dtype, non_blocking=True))
        return features.split([len(batch.label) for batch in group])


class _Clock:
    """Time and steps since this process began to train, on top of those of earlier processes."""

    def __init__(self, seconds_before: float, first_step: int) -> None:
        self._seconds_before = seconds_before
        self._first_step = first_step
        self._start = time.perf_counter()

    def total(self) -> float:
        """Seconds spent training, earlier processes included."""
        return self._seconds_before + time.perf_counter() - self._start

    def rate(self, step: int) -> float:
        """Mean steps per second of this process."""
        return (step - self._first_step) / (time.perf_counter() - self._start)
