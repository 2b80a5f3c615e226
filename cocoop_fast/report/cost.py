"""Time and memory of a run, beside what the dense way is predicted to take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.engine.pieces import ROWS_PER_INFERENCE_PASS
from cocoop_fast.extension import extension_available
from cocoop_fast.measure.devices import ITEMSIZE, Device
from cocoop_fast.measure.predict import Model, Prediction, Schedule, Setting, predict_dense, predict_tree
from cocoop_fast.measure.sizes import RowCounts, TowerSizes
from cocoop_fast.methods.learner import ContextLearner
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


def estimate(inspection: Inspection) -> Cost | None:
    """Predict a training step with the cost model of :mod:`cocoop_fast.plan`, for this machine.

    Only of text: images cost the same both ways. ``None`` for what has no shared context before the class name,
    which is all that the model covers.
    """
    run, clip, learner = inspection.run, inspection.clip, inspection.model.prompt_learner
    if not isinstance(learner, ContextLearner) or learner.ctx.ndim != 2:
        return None
    if run.config.prompt.class_position != "end":
        return None
    batch = run.config.optim.batch_size or 1
    with torch.no_grad():
        feature = torch.ones(1, inspection.model.embed_dim, device=learner.ctx.device)
        depends_on_image = learner.contexts(feature).ndim > 2
    passes = batch if depends_on_image else 1  # over the class tree, in a step
    tree = ClassTree.from_layout(learner.layout)
    sizes = TowerSizes.of(FrozenCLIP(clip.model).text_weights())
    device, packs = _measure(clip.device, clip.precision, sizes, tree, passes)
    setting = Setting(
        model=Model(
            name=clip.name,
            sizes=sizes,
            parameters=sum(parameter.numel() for parameter in clip.model.parameters()),
            image_flops=0.0,
            image_launches=0,
        ),
        counts=RowCounts.of(tree),
        batch=passes,
        itemsize=ITEMSIZE.get(clip.precision, ITEMSIZE["fp32"]),
        device=device or _Unknown(),
        rows_per_inference_pass=ROWS_PER_INFERENCE_PASS,
        packs_weights=packs,
    )
    start = run.history.start
    nothing_else = Schedule(train_images=0, epochs=0, test_images=0)
    return Cost(
        tree=predict_tree(setting, nothing_else, ENOUGH),
        dense=predict_dense(setting, nothing_else, ENOUGH),
        steps=int(start.get("epochs", 0)) * int(start.get("steps_per_epoch", 0)),
        device=None if device is None else device.name,
    )


def _measure(
    where: torch.device, precision: str, sizes: TowerSizes, tree: ClassTree, batch: int
) -> tuple[Device | None, bool]:
    """This machine, if it can be measured, and whether the engine keeps packed weights on it."""
    if where.type == "cuda":
        from cocoop_fast.measure.this_gpu import measure_gpu

        return measure_gpu(precision if precision in ITEMSIZE else "fp32"), False
    if not extension_available():
        return None, False
    from cocoop_fast.measure.this_machine import measure_cpu

    machine = measure_cpu(sizes, tree, batch, rounds=_ROUNDS, max_seconds=_SECONDS)
    return machine, machine.packs_weights


class _Unknown:
    """A device whose speed is not known: its seconds are not numbers."""

    name = "unknown"
    memory_bytes = None

    def rates(self) -> dict[str, str]:
        return {}

    def seconds(self, operation: object, itemsize: int, *, eager: bool = False) -> float:
        return float("nan")
