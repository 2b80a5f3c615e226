"""From costs and a device to seconds, bytes and the largest batch that fits. Every figure here is a prediction."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cocoop_fast.clip.frozen import TextWeights
from cocoop_fast.engine.pieces import ROWS_PER_INFERENCE_PASS
from cocoop_fast.measure.cost import Cost, DenseCost, GpuLayout, PassCost, RowCounts, RowKernel, TreeCost
from cocoop_fast.measure.devices import Device
from cocoop_fast.ops.shapes import Layout
from cocoop_fast.prompts.tree import ClassTree

MOST_IMAGES = 1 << 20  # beyond this no batch is looked for
REFERENCE_TEST_BATCH = 100


@dataclass(frozen=True)
class Model:
    """A CLIP as far as a plan needs it."""

    name: str
    weights: TextWeights  # on meta, of the dtype that is planned for
    parameters: int  # of both towers
    image_flops: float  # of one image through the image tower
    image_launches: int  # its modules that compute something

    @property
    def context_length(self) -> int:
        """L."""
        return len(self.weights.positional_embedding)


@dataclass(frozen=True)
class Schedule:
    """How much there is to do."""

    train_images: int  # an epoch
    epochs: int
    test_images: int


@dataclass(frozen=True)
class Setting:
    """What is predicted for: the frozen model, the classes, a batch size, a device."""

    model: Model
    tree: ClassTree
    batch: int
    device: Device
    layout: Layout  # how the engine arranges things there
    process_bytes: int = 0  # what any step takes besides what is counted

    @cached_property
    def counts(self) -> RowCounts:
        return RowCounts.of(self.tree)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.model.weights.dtype.itemsize


@dataclass(frozen=True)
class Memory:
    """Bytes, by what needs them."""

    model: int  # parameters of both towers
    class_list: int  # what is made once from the model and the class names
    activations: int  # of a step, at its peak
    process: int

    @property
    def total(self) -> int:
        return self.model + self.beyond_model

    @property
    def beyond_model(self) -> int:
        return self.class_list + self.activations + self.process


@dataclass(frozen=True)
class Prediction:
    """One way to compute a setting, predicted."""

    step: PassCost  # of the batch
    memory: Memory
    step_seconds: float  # forward and backward from the image features on
    image_seconds: float  # encoding the batch's images
    epoch_seconds: float
    training_seconds: float
    evaluation_seconds: float
    largest_batch: int  # that fits the budget; 0: not even one image
    fits: bool  # whether this batch does


def predict_tree(setting: Setting, schedule: Schedule, budget: int) -> Prediction:
    """The engine: distinct rows once.

    Args:
        setting: what is predicted for.
        schedule: images and epochs.
        budget: bytes that everything together may take.
    """
    cost = TreeCost(setting.model.weights, setting.tree, setting.layout)
    rows = ROWS_PER_INFERENCE_PASS["cuda" if isinstance(setting.layout, GpuLayout) else "cpu"]
    return _predict(cost, setting, schedule, budget, rows // setting.tree.rows)


def predict_dense(setting: Setting, schedule: Schedule, budget: int) -> Prediction:
    """The reference: all tokens of all prompts, image by image, in eager PyTorch. Arguments as for the tree."""
    cost = DenseCost(setting.model.weights, setting.tree)
    return _predict(cost, setting, schedule, budget, REFERENCE_TEST_BATCH)


def seconds_of_pass(cost: PassCost, device: Device, *, eager: bool = False) -> float:
    """Predicted seconds of a pass on a device."""
    return sum(n * device.seconds(op, cost.itemsize, eager=eager) for op, n in cost.operations.items())


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch size for which ``fits(batch)`` holds, as it does for all smaller ones; 0 if none."""
    return bisect_left(range(1, MOST_IMAGES), True, key=lambda batch: not fits(batch))


def _predict(
    cost: Cost, setting: Setting, schedule: Schedule, budget: int, images_of_a_test_pass: int
) -> Prediction:
    model, device = setting.model, setting.device

    def memory_of(batch: int) -> Memory:
        activations = cost.activation_bytes(batch, keeps=True)
        return Memory(
            model.parameters * setting.itemsize, cost.class_list_bytes, activations, setting.process_bytes
        )

    def image_seconds(batch: int) -> float:
        """The image tower's FLOPs at the rate of products that fill the device; weights are read once."""
        flops = batch * model.image_flops
        encoder = RowKernel("image_encoder", model.parameters, flops, model.image_launches)
        return device.seconds(encoder, setting.itemsize, eager=True)

    step, memory = cost.step(setting.batch), memory_of(setting.batch)
    step_seconds = seconds_of_pass(step, device, eager=cost.eager)
    # As the reference's loader: an incomplete last batch is dropped, unless it is all there is.
    steps = max(1, schedule.train_images // setting.batch) if schedule.train_images else 0
    epoch_seconds = steps * (step_seconds + image_seconds(setting.batch))
    group = max(1, min(images_of_a_test_pass, schedule.test_images))
    # Only training steps are replayed.
    pass_seconds = seconds_of_pass(cost.inference(group), device, eager=True) + image_seconds(group)
    return Prediction(
        step=step,
        memory=memory,
        step_seconds=step_seconds,
        image_seconds=image_seconds(setting.batch),
        epoch_seconds=epoch_seconds,
        training_seconds=schedule.epochs * epoch_seconds,
        evaluation_seconds=schedule.test_images / group * pass_seconds,
        largest_batch=largest_batch(lambda batch: memory_of(batch).total <= budget),
        fits=memory.total <= budget,
    )
