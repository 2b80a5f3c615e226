"""Time and memory of a run, beside what the dense way is predicted to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from cocoop_fast.clip.frozen import FrozenCLIP, TextWeights
from cocoop_fast.engine.contexts import dense_contexts
from cocoop_fast.measure.cost import layout_on
from cocoop_fast.measure.devices import DTYPES, Device
from cocoop_fast.measure.predict import Model, Prediction, Schedule, Setting, predict_dense, predict_tree
from cocoop_fast.methods.learner import ContextLearner
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.prompts.tree import ClassTree
from cocoop_fast.report.inspection import Inspection

ENOUGH = 1 << 62  # bytes: whether a batch fits is not asked here
_ROUNDS, _SECONDS = 2, 0.2  # a rough measurement of this machine will do


@dataclass(frozen=True)
class Cost:
    """A training step of the run's model and classes, predicted both ways.

    Args:
        tree: distinct rows once.
        dense: the reference's way: every prompt with all its tokens.
        steps: of the whole run.
        device: what the seconds are for; ``None``: only what is counted (rows, FLOPs, bytes) means anything.
    """

    tree: Prediction
    dense: Prediction
    steps: int
    device: str | None


Measure: TypeAlias = Callable[[torch.device, str, TextWeights, ClassTree, int], Device | None]


def measure_here(
    where: torch.device, precision: str, weights: TextWeights, tree: ClassTree, batch: int
) -> Device | None:
    """This machine, if it can be measured."""
    if where.type == "cuda":
        from cocoop_fast.measure.this_machine import measure_gpu

        return measure_gpu(precision if precision in DTYPES else "fp32")
    if CPP.why_unavailable():
        return None
    from cocoop_fast.measure.this_machine import measure_cpu

    return measure_cpu(weights, tree, batch, rounds=_ROUNDS, max_seconds=_SECONDS)


def estimate(inspection: Inspection, measure: Measure = measure_here) -> Cost | None:
    """Predict a training step with the cost model of :mod:`cocoop_fast.measure`, for this machine.

    Only of text: images cost the same both ways. ``None`` for what has no shared context before the class name,
    which is all that the model covers.

    Args:
        inspection: of a finished run.
        measure: this machine, or nothing.
    """
    run, clip, learner = inspection.run, inspection.clip, inspection.model.prompt_learner
    at_end = run.config.prompt.class_position == "end"
    if not isinstance(learner, ContextLearner) or learner.ctx.ndim != 2 or not at_end:
        return None
    batch = run.config.optim.batch_size or 1
    with torch.no_grad():
        feature = torch.ones(1, inspection.model.embed_dim, device=learner.ctx.device)
        depends_on_image = dense_contexts(learner.contexts(feature)).ndim > 2
    passes = batch if depends_on_image else 1  # over the class tree, in a step
    tree = ClassTree.from_layout(learner.layout)
    weights = FrozenCLIP(clip.model).text_weights()
    device = measure(clip.device, clip.precision, weights, tree, passes)
    parameters = sum(parameter.numel() for parameter in clip.model.parameters())
    setting = Setting(
        model=Model(clip.name, weights, parameters, image_flops=0.0, image_launches=0),
        tree=tree,
        batch=passes,
        device=device or _Unknown(),
        layout=layout_on(clip.device.type),
    )
    start = run.history.start
    nothing_else = Schedule(train_images=0, epochs=0, test_images=0)
    return Cost(
        tree=predict_tree(setting, nothing_else, ENOUGH),
        dense=predict_dense(setting, nothing_else, ENOUGH),
        steps=int(start.get("epochs", 0)) * int(start.get("steps_per_epoch", 0)),
        device=None if device is None else device.name,
    )


class _Unknown:
    """A device whose speed is not known: its seconds are not numbers."""

    name = "unknown"
    memory_bytes = None

    def rates(self) -> dict[str, str]:
        return {}

    def seconds(self, operation: object, itemsize: int, *, eager: bool = False) -> float:
        return float("nan")
