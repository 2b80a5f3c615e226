"""A trainer for Dassl's loop: the model, its loss and its gradients are ours, all else is the trainer's it replaces."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import ClipModel
from cocoop_fast.clip.load import amp_text_dtype
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.evaluate import autocast
from cocoop_fast.methods.cocoop import CustomCLIP
from cocoop_fast.methods.coop import CoOp
from cocoop_fast.training.precision import LossScaler, needs_loss_scaling
from cocoop_fast.training.step import Step, loss_and_gradients
from cocoop_fast.training.step_graph import CudaGraphs, RecordedSteps


class FastTrainer:
    """The first base of a fast trainer; the second is the trainer of CoOp's repository that it replaces.

    From Dassl's ``SimpleTrainer`` and the trainer replaced come ``check_cfg``, ``parse_batch_train``, ``load_model``,
    ``model_inference``, the loop and the evaluation; B images, K classes.

    What differs from the replaced trainer's numbers, on purpose: with ``PREC fp16`` what is learned is float32 and the
    loss is scaled (the reference learns in float16, and small steps round to nothing); a loss that is not finite ends
    the run; one GPU is used, however many there are.
    """

    replaced: type
    fast_model: type[CoOp]
    logged: tuple[str, ...]

    cfg: Any
    dm: Any
    device: torch.device
    batch_idx: int
    num_batches: int
    register_model: Callable[..., None]
    update_lr: Callable[[], None]
    detect_anomaly: Callable[[Tensor], None]
    parse_batch_train: Callable[[Any], tuple[Tensor, Tensor]]

    def build_model(self) -> None:
        """Load CLIP by the replaced trainer's own function; register the prompt learner with optimizer and schedule."""
        from dassl.optim import build_lr_scheduler, build_optimizer
        from dassl.utils import load_pretrained_weights

        cfg = self.cfg
        print(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME})")
        clip_model = self._load_clip(cfg)
        self.precision: str = getattr(cfg.TRAINER, self.fast_model.learner.section).PREC
        if self.precision == "fp16" and self.device.type == "cpu":
            print("PREC fp16 is computed in fp32 on a CPU")
            self.precision = "fp32"
        if self.precision != "fp16":
            clip_model.float()

        print("Building custom CLIP (cocoop_fast)")
        clip_model.to(self.device).requires_grad_(False)
        text_dtype = amp_text_dtype(self.precision, self.device)
        self.model = self.fast_model(cfg, self.dm.dataset.classnames, clip_model, text_dtype=text_dtype)
        learner = self.model.prompt_learner
        learner.saves_tokens = True  # so that the reference's strict resume reads what is written here
        print(f"Number of context words (tokens): {learner.n_ctx}")
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(learner, cfg.MODEL.INIT_WEIGHTS)
        self.model.to(self.device)
        self.optim = build_optimizer(learner, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("prompt_learner", learner, self.optim, self.sched)

        self._parameters = list(learner.parameters())
        self.scaler = LossScaler(self.device, enabled=needs_loss_scaling(self.precision, True, self.device))
        self._step: Step = loss_and_gradients(self.model, self._parameters, self.precision, self.scaler)
        if self.device.type == "cuda":
            graphs = CudaGraphs(self.device)
            self._step = RecordedSteps(self._step, print, graphs, self.model.why_not_recorded)
            if torch.cuda.device_count() > 1:
                print("One GPU is used; train further seeds or data sets on the others")

    def forward_backward(self, batch: Any) -> dict[str, float]:
        """One optimizer step on a batch of Dassl's; the learning rate moves on after an epoch's last.

        Raises:
            FloatingPointError: the loss is not finite. Nothing has been changed by it.
            UserError: float16 gradients overflow however small the scale of the loss.
        """
        image, label = self.parse_batch_train(batch)
        with torch.no_grad(), autocast(self.precision, self.device):
            features = self.model.image_encoder(image.to(self.model.dtype))
        result = self._step(features, label)
        loss, correct, scale, *_ = result.report.tolist()
        self.detect_anomaly(result.report[0])
        self.scaler.observe(scale)
        for parameter, gradient in zip(self._parameters, result.gradients, strict=True):
            parameter.grad = gradient
        self.scaler.step(self.optim)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        summary = {"loss": loss, "acc": 100.0 * correct / len(label)}
        return {name: summary[name] for name in self.logged}

    def after_train(self) -> None:
        """Test. Both wordings of the end are written: result parsers wait for the one or the other."""
        print("Finish training")
        print("Finished training")
        super().after_train()  # type: ignore[misc]  # the replaced trainer's

    def _load_clip(self, cfg: Any) -> ClipModel:
        home = self.replaced.__module__
        load = getattr(sys.modules[home], "load_clip_to_cpu", None)
        if load is None:
            raise UserError(
                f"The module {home} of trainer {self.replaced.__name__} has no `load_clip_to_cpu`, which CoOp's have; "
                "use that trainer without cocoop_fast."
            )
        return load(cfg)


# By the name of the trainer that is replaced: its model, and what it logs of a step.
FAST_TRAINERS: dict[str, tuple[type[CoOp], tuple[str, ...]]] = {
    "CoCoOp": (CustomCLIP, ("loss",)),
    "CoOp": (CoOp, ("loss", "acc")),
}


@cache
def fast_trainer(name: str, replaced: type) -> type:
    """The class to use instead of a trainer that is registered as ``name``, one of ``FAST_TRAINERS``."""
    model, logged = FAST_TRAINERS[name]
    own = {"fast_model": model, "logged": logged, "replaced": replaced, "__doc__": FastTrainer.__doc__}
    return type(replaced.__name__, (FastTrainer, replaced), own)
