"""The training loop: frozen image features, one loss, one optimizer step, and nothing else."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from cocoop_fast.config import OptimConfig
from cocoop_fast.data.batches import Batch, TrainBatches
from cocoop_fast.distributed.class_shards import share_classes
from cocoop_fast.distributed.ranks import ALONE, Ranks
from cocoop_fast.engine.pruning import Pruned
from cocoop_fast.errors import UserError, is_out_of_memory
from cocoop_fast.methods.base import PromptClassifier
from cocoop_fast.training.features import EncodedBatch, FeatureSource, ImageFeatures
from cocoop_fast.training.observer import EpochInfo, Observer, StepInfo
from cocoop_fast.training.optimizer import build_optimizer
from cocoop_fast.training.precision import LossScaler, needs_loss_scaling
from cocoop_fast.training.readback import Readback
from cocoop_fast.training.schedule import learning_rate
from cocoop_fast.training.step import LossAndGradients, RepeatedTogether, Step, StepResult, SummedOverRanks
from cocoop_fast.training.step_graph import RecordedSteps
from cocoop_fast.training.stop_signals import StopSignals

# On a GPU the host launches steps without waiting for them. So many may be under way before it reads the loss of the
# oldest: enough to bridge the reading of an image, few enough that what is shown is not old.
_STEPS_UNDER_WAY = 4
# After so many steps in a row without a finite loss and gradient it is no single image's fault.
_MOST_SKIPPED_IN_A_ROW = 10
# A group is read, and on a GPU encoded, while the steps of the group before it run.
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
    loss is read some steps later. On a CPU, and where steps may have to be skipped, each step is over before the next
    begins.

    A step that runs out of memory is repeated in smaller pieces. What else may befall a run is in docs/robustness.md.

    Args:
        model: on its device, already in its precision.
        batches: what to train on.
        optim: resolved; ``epochs`` is set.
        precision: fp32, fp16, bf16 or amp. fp16 (and amp on a GPU) scale the loss.
        cuda_graph: whether a GPU replays recorded steps.
        observer: is told about each step, in their order.
        ranks: in their grid; the batches have this rank's share of the images.
        features: of the batches; ``None``: see :class:`ImageFeatures`.
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
        ranks: Ranks = ALONE,
        features: FeatureSource | None = None,
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
        self._features = features or ImageFeatures(
            model, batches, precision, self.device, groups_ahead=_GROUPS_AHEAD
        )
        self._ranks = ranks
        self._shared = share_classes(model, ranks.classes)
        self._step: Step = LossAndGradients(self._shared, self._parameters, precision, self.scaler)
        if on_gpu and cuda_graph and self._shared is model:  # what ranks tell each other is not recorded
            self._step = RecordedSteps(self._step, self.observer.on_message)
        if ranks.classes.size > 1:
            self._step = RepeatedTogether(self._step, ranks.classes)
        if ranks.everyone.size > 1:
            self._step = SummedOverRanks(self._step, ranks)
        late = on_gpu and optim.on_nonfinite == "stop"
        self._reports: Readback[_LaunchedStep] = Readback(_STEPS_UNDER_WAY if late else 0)
        self._skipped_in_a_row = 0
        self._short_of_memory = False
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

        After SIGINT or SIGTERM the step is finished and saved first. A second signal ends the process at once.

        Raises:
            UserError: loss or gradient is infinite or not a number, which names the step and its images (on a GPU a
                few steps more may have been done by then); or parameters are; or float16 gradients always overflow;
                or an image cannot be read, or memory does not suffice, whatever is tried.
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, with status 0.
        """
        self.model.prompt_learner.train()
        clock = _Clock(self.seconds, self.step)
        # Graphs and kernels go to the current GPU, which need not be the model's.
        gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with gpu, StopSignals() as stop:
            while self.position.epoch <= self.epochs and stop.agreed is None:
                self._epoch(clock, save, save_every, stop)
            if stop.agreed is not None:
                self.observer.on_message(
                    f"Stopped by {stop.agreed.name} after step {self.step}; the same command goes on from there."
                )
        stop.agree(self._ranks)  # a signal since the last step
        stop.raise_received()

    def _epoch(
        self, clock: _Clock, save: Callable[[], None] | None, save_every: int, stop: StopSignals
    ) -> None:
        epoch, first_batch = self.position
        n_batches = len(self.batches)
        lr = self.rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.observer.on_epoch_start(epoch, self.epochs, first_batch, n_batches)
        totals = _Totals()

        def settle_and_save() -> None:
            self._settle(totals, clock)
            if save is not None:
                save()

        epoch_started = mark = time.perf_counter()
        batches = _until_unreadable(self._features.epoch(epoch, first_batch), settle_and_save)
        with closing(batches):  # whoever reads ahead ends here, however the epoch does
            for encoded in batches:
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
                stop.agree(self._ranks)
                if last:
                    break
                if stop.agreed is not None:
                    settle_and_save()
                    return
                if save is not None and save_every and self.step % save_every == 0:
                    settle_and_save()
        self._settle(totals, clock)
        seconds = time.perf_counter() - epoch_started
        self.observer.on_epoch_end(
            EpochInfo(
                epoch=epoch,
                epochs=self.epochs,
                loss=totals.loss / max(1, totals.steps),  # all may have been skipped
                accuracy=100.0 * totals.correct / max(1, totals.images),
                lr=lr,
                seconds=seconds,
                images_per_second=totals.images / seconds,
                classes_kept=fmean(p.classes_kept for p in totals.pruned) if totals.pruned else None,
                share_left_out=fmean(p.share_left_out for p in totals.pruned) if totals.pruned else None,
                skipped_steps=self.scaler.skipped,
            )
        )
        if save is not None:
            save()

    def _launch(self, encoded: EncodedBatch, launched: _LaunchedStep) -> list[_LaunchedStep]:
        """Do one step; return those whose results could be read by now, this one if nothing is under way.

        They are looked at before the parameters change: without steps under way, a broken loss leaves no trace.
        """
        if not self._reports.lag:  # otherwise their loss will tell
            broken = ~encoded.features.isfinite().all(dim=1)
            if self._ranks.highest(int(broken.any())):
                self._refuse("The image features are NaN or infinite", launched, encoded.batch.sample[broken])
                return []
        result = self._compute(encoded, launched)
        launched.pruned = result.pruned
        self._reports.push(result.report, launched)
        read = [self._checked(step, *values) for step, values in self._reports.due()]
        if launched.skipped:
            return []
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

    def _compute(self, encoded: EncodedBatch, launched: _LaunchedStep) -> StepResult:
        """Loss and gradients, in smaller and smaller pieces while memory does not suffice."""
        while True:
            try:
                return self._step(encoded.features, encoded.label)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self._make_room(launched)  # out here, where nothing refers to the failed step's tensors any more

    def _make_room(self, step: _LaunchedStep) -> None:
        gc.collect()
        advice = "use a smaller batch size, or give the process more memory"
        lower = getattr(self._shared, "lower_memory", None)
        try:
            if lower is None:
                raise UserError("nothing here can be computed in pieces")
            lower(len(step.images.label))
        except UserError as error:
            raise UserError(
                f"The memory is used up at step {step.number}, however small the pieces of a step ({error}); {advice}.",
                exit_status=1,
            ) from error
        if self.device.type == "cuda":  # what the engine and the failed step held goes back to the device
            torch.cuda.empty_cache()
        if not self._short_of_memory:
            self._short_of_memory = True
            self.observer.on_message(
                f"The memory was used up at step {step.number}. It is repeated, and steps go on, in smaller pieces, which "
                "takes longer and changes nothing but rounding."
            )

    def _checked(
        self, step: _LaunchedStep, loss: float, correct: float, scale: float, gradient: float
    ) -> _LaunchedStep:
        if not math.isfinite(loss):
            self._refuse(f"The loss became {loss}", step)
            return step
        if not (math.isfinite(gradient) or self.scaler.enabled):
            self._refuse(f"The gradient became {gradient}, although the loss is {loss:.4g},", step)
            return step
        self._skipped_in_a_row = 0
        self.scaler.observe(scale)
        step.loss, step.correct, step.skipped_steps = loss, int(correct), self.scaler.skipped
        return step

    def _refuse(self, fault: str, step: _LaunchedStep, samples: Tensor | None = None) -> None:
        """Skip a step that is not to change the parameters, or end the run, as is configured.

        Args:
            samples: those of the step that are known to be at fault; ``None``: any.
        """
        own = step.images.sample if samples is None else samples
        everybodys = dict.fromkeys(
            i for one in self._ranks.everyone.gather_objects(own.tolist()) for i in one
        )
        images = self.batches.describe(torch.tensor([*everybodys]))
        what = f"{fault} at step {step.number} (epoch {step.epoch}), on {images}"
        advice = "try a lower learning rate, or precision fp32"
        if self.optim.on_nonfinite == "stop":
            raise UserError(
                f"{what}; {advice}, or leave such steps out with --on-nonfinite skip.", exit_status=1
            )
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == _MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{what}, and so it was in the {_MOST_SKIPPED_IN_A_ROW - 1} steps before; {advice}.",
                exit_status=1,
            )
        step.skipped = True
        self.scaler.skip()
        self.observer.on_message(f"{what}; the step is skipped.")

    def _tell(self, step: _LaunchedStep, totals: _Totals, clock: _Clock) -> None:
        images, total_steps = (
            len(step.images.label) * self._ranks.images.size,
            self.epochs * len(self.batches),
        )
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
    skipped: bool = False  # this one
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


def _until_unreadable(
    batches: Iterator[EncodedBatch], rescue: Callable[[], None]
) -> Generator[EncodedBatch, None, None]:
    """The same batches; ``rescue`` is called before an image that cannot be read ends the run."""
    try:
        yield from batches
    except UserError:
        rescue()
        raise


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
