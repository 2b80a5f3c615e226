"""The training loop: frozen image features, one loss, one optimizer step, and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch

from cocoop_fast.config import OptimConfig
from cocoop_fast.data.batches import Batch, TrainBatches
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.classifier import PromptClassifier
from cocoop_fast.pruning import Pruned
from cocoop_fast.training.features import EncodedBatch, ImageFeatures
from cocoop_fast.training.observer import EpochInfo, Observer, StepInfo
from cocoop_fast.training.optimizer import build_optimizer
from cocoop_fast.training.precision import LossScaler, needs_loss_scaling
from cocoop_fast.training.readback import Readback
from cocoop_fast.training.schedule import learning_rate
from cocoop_fast.training.step import LossAndGradients, Step
from cocoop_fast.training.step_graph import RecordedSteps

# On a GPU the host launches steps without waiting for them. So many may be under way before it reads the loss of the
# oldest: enough to bridge the reading of an image, few enough that what is shown is not old.
_STEPS_UNDER_WAY = 4
# The encoder of a group runs while the steps of the group before it do.
_GROUPS_AHEAD = 2


class Position(NamedTuple):
    """The next thing to do: batch ``batch``, counted from 0, of the 1-based ``epoch``."""

    epoch: int = 1
    batch: int = 0


class Trainer:
    """Trains the prompt learner of a model; works for any model of the interface below.

    The model has ``prompt_learner`` (its parameters are all that is learned), ``image_encoder``, ``dtype``
    and ``loss_and_logits(image_features (B, E), label (B,)) -> (scalar loss, logits (B, K))``.

    On a GPU no step makes the host wait: features are encoded ahead, the step is replayed from a CUDA graph, and its
    loss is read some steps later. On a CPU each step is over before the next begins.

    Args:
        model: on its device, already in its precision.
        batches: what to train on.
        optim: resolved; ``epochs`` is set.
        precision: fp32, fp16, bf16 or amp. fp16 (and amp on a GPU) scale the loss.
        cuda_graph: whether a GPU replays recorded steps.
        observer: is told about each step, in their order.
    """

    def __init__(
        self,
        model: PromptClassifier,
        batches: TrainBatches,
        optim: OptimConfig,
        *,
        precision: str = "fp32",
        cuda_graph: bool = True,
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.optim = optim
        self.observer = observer or Observer()
        if not optim.master_weights:
            model.prompt_learner.to(model.dtype)
        self._parameters = [p.requires_grad_(True) for p in model.prompt_learner.parameters()]
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        self.optimizer = build_optimizer(self._parameters, optim, fused=on_gpu)
        self.scaler = LossScaler(
            self.device, enabled=needs_loss_scaling(precision, optim.master_weights, self.device)
        )
        self._features = ImageFeatures(
            model, batches, precision, self.device, groups_ahead=_GROUPS_AHEAD if on_gpu else 0
        )
        self._step: Step = LossAndGradients(model, self._parameters, precision, self.scaler)
        if on_gpu and cuda_graph:
            self._step = RecordedSteps(self._step, self.observer.on_message)
        self._reports: Readback[_LaunchedStep] = Readback(_STEPS_UNDER_WAY if on_gpu else 0)
        self.position = Position()
        self.rate: Callable[[int], float] = partial(learning_rate, optim)  # of an epoch
        self.seconds = 0.0  # spent training, earlier processes included

    @property
    def step(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return (self.position.epoch - 1) * len(self.batches) + self.position.batch

    @property
    def epochs(self) -> int:
        return self.optim.epochs or 0

    def fit(self, *, save: Callable[[], None] | None = None, save_every: int = 0) -> None:
        """Train from where the run stands to its end.

        Args:
            save: called between steps, after each epoch and each ``save_every`` steps of the run. Every loss before
                and every parameter has been looked at by then, and is finite.
            save_every: 0: after epochs only.

        Raises:
            UserError: the loss is infinite or not a number, which names the step and its images (on a GPU a few
                steps more may have been done by then); or parameters are; or float16 gradients always overflow.
        """
        self.model.prompt_learner.train()
        clock = _Clock(self.seconds, self.step)
        # Graphs and kernels go to the current GPU, which need not be the model's.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            while self.position.epoch <= self.epochs:
                self._epoch(clock, save, save_every)
                if save is not None:
                    save()

    def _epoch(self, clock: _Clock, save: Callable[[], None] | None, save_every: int) -> None:
        epoch, first_batch = self.position
        n_batches = len(self.batches)
        lr = self.rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.observer.on_epoch_start(epoch, self.epochs, first_batch, n_batches)
        totals = _Totals()
        epoch_started = mark = time.perf_counter()
        for encoded in self._features.epoch(epoch, first_batch):
            launched = _LaunchedStep(encoded.batch, self.step + 1, epoch, self.position.batch + 1, lr)
            launched.data_seconds = time.perf_counter() - mark
            read = self._launch(encoded, launched)
            last = launched.batch == n_batches
            self.position = Position(epoch + 1) if last else Position(epoch, launched.batch)
            self.seconds = clock.total()
            launched.seconds = time.perf_counter() - mark
            mark = time.perf_counter()
            for step in read:
                self._tell(step, totals, clock)
            if last or (save is not None and save_every and self.step % save_every == 0):
                self._settle(totals, clock)
                if save is not None and not last:
                    save()
        seconds = time.perf_counter() - epoch_started
        self.observer.on_epoch_end(
            EpochInfo(
                epoch=epoch,
                epochs=self.epochs,
                loss=totals.loss / totals.steps,
                accuracy=100.0 * totals.correct / totals.images,
                lr=lr,
                seconds=seconds,
                images_per_second=totals.images / seconds,
                classes_kept=fmean(p.classes_kept for p in totals.pruned) if totals.pruned else None,
                share_left_out=fmean(p.share_left_out for p in totals.pruned) if totals.pruned else None,
                skipped_steps=self.scaler.skipped,
            )
        )

    def _launch(self, encoded: EncodedBatch, launched: _LaunchedStep) -> list[_LaunchedStep]:
        """Do one step; return those whose results could be read by now, this one if nothing is under way.

        They are looked at before the parameters change: without steps under way, a broken loss leaves no trace.
        """
        result = self._step(encoded.features, encoded.label)
        launched.pruned = result.pruned
        self._reports.push(result.report, launched)
        read = [self._checked(step, *values) for step, values in self._reports.due()]
        for parameter, gradient in zip(self._parameters, result.gradients, strict=True):
            parameter.grad = gradient
        self.scaler.step(self.optimizer)
        return read

    def _settle(self, totals: _Totals, clock: _Clock) -> None:
        """Wait for all steps under way, and look at their results and what they made of the parameters."""
        for step, values in self._reports.rest():
            self._tell(self._checked(step, *values), totals, clock)
        self.scaler.settle()
        if not all(parameter.isfinite().all() for parameter in self._parameters):
            raise UserError(
                f"The learned parameters are not finite after step {self.step}, although its loss was; try a lower "
                "learning rate, or precision fp32.",
                exit_status=1,
            )

    def _checked(self, step: _LaunchedStep, loss: float, correct: float, scale: float) -> _LaunchedStep:
        if not math.isfinite(loss):
            raise UserError(
                f"The loss became {loss} at step {step.number} (epoch {step.epoch}), on "
                f"{self.batches.describe(step.images)}; try a lower learning rate, or precision fp32.",
                exit_status=1,
            )
        self.scaler.observe(scale)
        step.loss, step.correct, step.skipped_steps = loss, int(correct), self.scaler.skipped
        return step

    def _tell(self, step: _LaunchedStep, totals: _Totals, clock: _Clock) -> None:
        images, total_steps = len(step.images.label), self.epochs * len(self.batches)
        totals.add(step.loss, step.correct, images, step.pruned)
        steps_per_second = clock.rate(self.step)
        self.observer.on_step(
            StepInfo(
                step=step.number,
                total_steps=total_steps,
                epoch=step.epoch,
                epochs=self.epochs,
                batch=step.batch,
                batches=len(self.batches),
                loss=step.loss,
                accuracy=100.0 * step.correct / images,
                lr=step.lr,
                seconds=step.seconds,
                data_seconds=step.data_seconds,
                images_per_second=steps_per_second * images,
                eta_seconds=(total_steps - self.step) / steps_per_second,
                skipped_steps=step.skipped_steps,
                classes_kept=step.pruned.classes_kept if step.pruned else None,
                share_left_out=step.pruned.share_left_out if step.pruned else None,
            )
        )


@dataclass
class _LaunchedStep:
    """What the host knows of a step when it launches it, and what it reads later."""

    images: Batch
    number: int  # 1-based, over the whole run
    epoch: int
    batch: int  # 1-based within the epoch
    lr: float
    data_seconds: float = 0.0  # the host waited for data
    seconds: float = 0.0  # from the step before to this one
    loss: float = 0.0
    correct: int = 0
    skipped_steps: int = 0
    pruned: Pruned | None = None


@dataclass
class _Totals:
    """Sums over the steps of an epoch."""

    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    images: int = 0
    pruned: list[Pruned] = field(default_factory=list)

    def add(self, loss: float, correct: int, images: int, pruned: Pruned | None) -> None:
        self.steps += 1
        self.pruned += [] if pruned is None else [pruned]
        self.loss += loss
        self.correct += correct
        self.images += images


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
