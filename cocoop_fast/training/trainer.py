"""The training loop: frozen image features, one loss, one optimizer step, and nothing else."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from cocoop_fast.config import ResolvedOptim
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.distributed.class_shards import share_classes
from cocoop_fast.distributed.ranks import ALONE, Ranks
from cocoop_fast.engine.graphs import CudaGraphs, Record, Recorded
from cocoop_fast.errors import UserError, is_out_of_memory
from cocoop_fast.methods.base import ImageClassifier
from cocoop_fast.training.average import GaussianAverage
from cocoop_fast.training.features import EncodedBatch, FeatureSource, ImageFeatures
from cocoop_fast.training.observer import EpochInfo, Means, Observer, StepInfo
from cocoop_fast.training.optimizer import build_optimizer
from cocoop_fast.training.precision import LossScaler, needs_loss_scaling
from cocoop_fast.training.readback import Readback
from cocoop_fast.training.schedule import learning_rate
from cocoop_fast.training.step import (
    Step,
    StepResult,
    loss_and_gradients,
    repeated_together,
    summed_over_ranks,
)
from cocoop_fast.training.stop_signals import StopSignals

# On a GPU the host launches steps without waiting for them. So many may be under way before it reads the loss of the
# oldest: enough to bridge the reading of an image, few enough that what is shown is not old.
_STEPS_UNDER_WAY = 4
# After so many steps in a row without a finite loss and gradient it is no single image's fault.
_MOST_SKIPPED_IN_A_ROW = 10
# A device that waited for images for more than this share of an epoch, and than these seconds, could do more; that is
# said once.
_MOST_WAITING, _LEAST_SECONDS_WAITING = 0.5, 0.5
# A group is read, and on a GPU encoded, while the steps of the group before it run.
_GROUPS_AHEAD = 2


class Position(NamedTuple):
    """The next thing to do: batch ``batch``, counted from 0, of the 1-based ``epoch``."""

    epoch: int = 1
    batch: int = 0


@dataclass(frozen=True)
class Launching:
    """How steps go to a device, and how far the host is ahead of it; by default not at all, as on a CPU.

    Args:
        fused: one kernel updates all parameters, and skips an overflow without asking the host.
        record: records steps, to be replayed; ``None``: each is launched anew.
        under_way: steps that may be launched before the report of the oldest is read.
    """

    fused: bool = False
    record: Record | None = None
    under_way: int = 0


class Trainer:
    """Trains the prompt learner of a model; works for any model of the interface below.

    The model has ``prompt_learner`` (its parameters are all that is learned), ``image_encoder``, ``dtype``
    and ``loss_and_logits(image_features (B, E), label (B,)) -> (scalar loss, logits (B, K))``.

    On a GPU no step makes the host wait: features are encoded ahead, the step is replayed from a CUDA graph, and its
    loss is read some steps later. On a CPU, and where steps may have to be skipped, each step is over before the next
    begins.

    A step that runs out of memory is repeated in smaller pieces. Other failures are described in docs/robustness.md.

    Args:
        model: on its device, already in its precision.
        batches: what to train on.
        optim: the recipe.
        precision: fp32, fp16, bf16 or amp. fp16 (and amp on a GPU) scale the loss.
        cuda_graph: whether a GPU replays recorded steps.
        observer: is told about each step, in their order.
        ranks: in their grid; the batches have this rank's share of the images.
        features: of the batches; ``None``: see :class:`ImageFeatures`.
        launching: ``None``: as the device wants it.

    Attributes:
        features, optimizer, scaler: what it is made of.
        average: of the parameters over the epochs, which they become at the end; ``None``: the last ones stay.
        position: the next step's.
        rate: the learning rate of a 1-based epoch.
        seconds: spent training, earlier processes included.
    """

    def __init__(
        self,
        model: ImageClassifier,
        batches: TrainBatches,
        optim: ResolvedOptim,
        *,
        precision: str = "fp32",
        cuda_graph: bool = True,
        observer: Observer | None = None,
        ranks: Ranks = ALONE,
        features: FeatureSource | None = None,
        launching: Launching | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.optim = optim
        self.observer = observer or Observer()
        if not optim.master_weights:
            model.prompt_learner.to(model.dtype)
        self._parameters = [p.requires_grad_(True) for p in model.prompt_learner.parameters()]
        self.device = device = next(model.parameters()).device
        if launching is None:
            on_gpu = Launching(True, CudaGraphs(device) if cuda_graph else None, _STEPS_UNDER_WAY)
            launching = on_gpu if device.type == "cuda" else Launching()
        self.optimizer = build_optimizer(self._parameters, optim, fused=launching.fused)
        self.average = GaussianAverage(self._parameters, optim.epochs) if optim.average else None
        scaled = needs_loss_scaling(precision, optim.master_weights, device)
        self.scaler = LossScaler(device, enabled=scaled)
        self.features = features or ImageFeatures(
            model, batches, precision, device, groups_ahead=_GROUPS_AHEAD
        )
        self._ranks = ranks
        self._shared = share_classes(model, ranks.classes)
        self._step: Step = loss_and_gradients(self._shared, self._parameters, precision, self.scaler)
        self._graphs: Recorded[StepResult] | None = None
        if launching.record and self._shared is model:  # what ranks tell each other is not recorded
            why_not = getattr(model, "why_not_recorded", lambda: None)
            self._step = self._graphs = Recorded(
                self._step, self.observer.on_message, launching.record, why_not
            )
        if ranks.classes.size > 1:
            self._step = repeated_together(self._step, ranks.classes)
        if ranks.everyone.size > 1:
            self._step = summed_over_ranks(self._step, ranks)
        # A step that may have to be skipped is looked at before its parameters change.
        self._on_gpu = launching.under_way > 0
        late = launching.under_way if optim.on_nonfinite == "stop" else 0
        self._reports: Readback[tuple[StepInfo, Tensor]] = Readback(late)
        self._images = min(batches.batch_size, len(batches.samples))  # of a step, of all ranks together
        self._means = Means()  # of the epoch
        self._skipped_in_a_row = 0
        self._short_of_memory = self._told_of_waiting = False
        self._waiting = 0.0  # seconds of the epoch
        self.position = Position()
        self.rate: Callable[[int], float] = partial(learning_rate, optim)
        self.seconds = 0.0

    @property
    def step(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return (self.position.epoch - 1) * len(self.batches) + self.position.batch

    def fit(self, *, save: Callable[[], None] = lambda: None, save_every: int = 0) -> None:
        """Train from where the run stands to its end.

        Args:
            save: called between steps, after each epoch and each ``save_every`` steps of the run. Every loss before
                and every parameter has been looked at by then, and is finite.
            save_every: 0: after epochs only.

        After SIGINT or SIGTERM the step is finished and saved first. A second signal ends the process at once.

        Raises:
            UserError: loss or gradient is infinite or not a number, which names the step and its images (on a GPU a
                few steps more may have been done by then); or parameters are; or float16 gradients always overflow;
                or an image cannot be read, or memory does not suffice even for the smallest pieces.
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, with status 0.
        """
        self.model.prompt_learner.train()
        self._first_step, self._seconds_before = self.step, self.seconds
        self._started = time.perf_counter()
        # Graphs and kernels go to the current GPU, which need not be the model's.
        gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with gpu, StopSignals() as stop:
            while self.position.epoch <= self.optim.epochs and stop.agreed is None:
                self._epoch(save, save_every, stop)
            if stop.agreed is not None:
                self.observer.on_message(
                    f"Stopped by {stop.agreed.name} after step {self.step}; the same command goes on from there."
                )
        stop.agree(self._ranks)  # a signal since the last step
        stop.raise_received()

    def _epoch(self, save: Callable[[], None], save_every: int, stop: StopSignals) -> None:
        epoch, first_batch = self.position
        epochs, n_batches = self.optim.epochs, len(self.batches)
        lr = self.rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.observer.on_epoch_start(epoch, epochs, first_batch, n_batches)
        self._means, self._waiting = Means(), 0.0

        def settle_and_save() -> None:
            self._settle()
            save()

        epoch_started = mark = time.perf_counter()
        batches = _until_unreadable(self.features.epoch(epoch, first_batch), settle_and_save)
        with closing(batches):  # reading ahead stops here, also when the epoch ends early
            for encoded in batches:
                batch = self.position.batch + 1
                info = StepInfo(self.step + 1, epochs * n_batches, epoch, epochs, batch, n_batches, lr=lr)
                info.data_seconds = time.perf_counter() - mark
                self._waiting += info.data_seconds
                read = self._launch(encoded, info)
                self.position = Position(epoch + 1) if batch == n_batches else Position(epoch, batch)
                info.seconds = time.perf_counter() - mark
                mark = time.perf_counter()
                self.seconds = self._seconds_before + mark - self._started
                self._tell(read)
                stop.agree(self._ranks)
                if batch == n_batches:
                    break
                if stop.agreed is not None:
                    settle_and_save()
                    return
                if save_every and self.step % save_every == 0:
                    settle_and_save()
        self._settle()
        if self.average is not None:
            self.average.add(epoch)
        seconds = time.perf_counter() - epoch_started
        self._tell_of_waiting(epoch, seconds)
        self.observer.on_epoch_end(
            EpochInfo(
                epoch=epoch,
                epochs=epochs,
                lr=lr,
                seconds=seconds,
                images_per_second=self._means.count * self._images / seconds,
                skipped_steps=self.scaler.skipped,
                **self._means.now(),
            )
        )
        save()

    def _tell_of_waiting(self, epoch: int, seconds: float) -> None:
        """Say, once, if the device could have done more. On a CPU reading and computing share the cores."""
        idle = self._on_gpu and self._waiting > max(_MOST_WAITING * seconds, _LEAST_SECONDS_WAITING)
        if idle and not self._told_of_waiting:
            self._told_of_waiting = True
            self.observer.on_message(
                f"The steps of epoch {epoch} waited for images {self._waiting:.1f} of {seconds:.1f} seconds; more "
                f"processes that read them (--workers, now {self.batches.workers}) or fixed views (--cache-views) feed the "
                "GPU better."
            )

    def _launch(self, encoded: EncodedBatch, info: StepInfo) -> list[StepInfo]:
        """Do one step; return those whose results could be read by now, this one if nothing is under way.

        They are looked at before the parameters change: without steps under way, a broken loss leaves no trace.
        """
        one_by_one = not self._reports.lag
        if one_by_one:  # otherwise their loss will tell
            broken = ~encoded.features.isfinite().all(dim=1)
            if self._ranks.highest(int(broken.any())):
                self._refuse("The image features are NaN or infinite", info, encoded.batch.sample[broken])
                return []
        result = self._compute(encoded, info)
        if result.pruned is not None:
            info.classes_kept, info.share_left_out = astuple(result.pruned)
        self._reports.push(result.report, (info, encoded.batch.sample))
        read = self._accepted(self._reports.due())
        if one_by_one and not read:
            return []
        for parameter, gradient in zip(self._parameters, result.gradients, strict=True):
            parameter.grad = gradient
        self.scaler.step(self.optimizer, result.overflow)
        return read

    def _settle(self) -> None:
        """Wait for all steps under way, and look at their results and what they made of the parameters."""
        self._tell(self._accepted(self._reports.rest()))
        self.scaler.settle()
        if not all(parameter.isfinite().all() for parameter in self._parameters):
            raise UserError(
                f"The learned parameters are not finite after step {self.step}, although its loss was; try a lower "
                "learning rate, or precision fp32.",
                exit_status=1,
            )

    def _compute(self, encoded: EncodedBatch, info: StepInfo) -> StepResult:
        """Loss and gradients, in smaller and smaller pieces while memory does not suffice."""
        while True:
            try:
                return self._step(encoded.features, encoded.label)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Out here, where nothing refers to the failed step's tensors any more.
            self._make_room(info.step, len(encoded.label))

    def _make_room(self, step: int, images: int) -> None:
        gc.collect()
        advice = "use a smaller batch size, or give the process more memory"
        lower = getattr(self._shared, "lower_memory", None)
        try:
            if lower is None:
                raise UserError("nothing here can be computed in pieces")
            lower(images)
        except UserError as error:
            raise UserError(
                f"The memory is used up at step {step}, however small the pieces of a step ({error}); {advice}.",
                exit_status=1,
            ) from error
        if self._graphs is not None:
            self._graphs.release()
        if self.device.type == "cuda":  # what the engine and the failed step held goes back to the device
            torch.cuda.empty_cache()
        if not self._short_of_memory:
            self._short_of_memory = True
            self.observer.on_message(
                f"The memory was used up at step {step}. It is repeated, and steps go on, in smaller pieces, which "
                "takes longer and changes nothing but rounding."
            )

    def _accepted(self, reports: list[tuple[tuple[StepInfo, Tensor], list[float]]]) -> list[StepInfo]:
        """Note what steps reported; those whose numbers are not finite are refused."""
        accepted = []
        for (info, samples), (loss, correct, scale, gradient) in reports:
            if not math.isfinite(loss):
                self._refuse(f"The loss became {loss}", info, samples)
            elif not (math.isfinite(gradient) or self.scaler.enabled):
                fault = f"The gradient became {gradient}, although the loss is {loss:.4g},"
                self._refuse(fault, info, samples)
            else:
                self._skipped_in_a_row = 0
                self.scaler.observe(scale)
                info.loss, info.accuracy = loss, 100.0 * correct / self._images
                info.skipped_steps = self.scaler.skipped
                accepted.append(info)
        return accepted

    def _refuse(self, fault: str, info: StepInfo, samples: Tensor) -> None:
        """Skip a step that is not to change the parameters, or end the run, as is configured.

        Args:
            samples: of the step, those that may be at fault.
        """
        everybodys = self._ranks.everyone.gather_objects(samples.tolist())
        images = self.batches.describe(torch.tensor([*dict.fromkeys(chain.from_iterable(everybodys))]))
        what = f"{fault} at step {info.step} (epoch {info.epoch}), on {images}"
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
        self.scaler.skipped += 1
        self.observer.on_message(f"{what}; the step is skipped.")

    def _tell(self, steps: list[StepInfo]) -> None:
        """Add what is known of steps by now, and tell the observer."""
        for info in steps:
            steps_per_second = (self.step - self._first_step) / (time.perf_counter() - self._started)
            info.images_per_second = steps_per_second * self._images
            info.eta_seconds = (info.total_steps - self.step) / steps_per_second
            self._means.add(
                loss=info.loss,
                accuracy=info.accuracy,
                classes_kept=info.classes_kept,
                share_left_out=info.share_left_out,
            )
            self.observer.on_step(info)


def _until_unreadable(
    batches: Iterator[EncodedBatch], rescue: Callable[[], None]
) -> Generator[EncodedBatch, None, None]:
    """The same batches; ``rescue`` is called before an image that cannot be read ends the run."""
    try:
        yield from batches
    except UserError:
        rescue()
        raise
