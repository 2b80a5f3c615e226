"""Trainers for Dassl's loop, as subclasses of those that a repository has registered.

:class:`FastTrainer`: the model, its loss and its gradients are ours, all else is the trainer's it replaces; for trainers
that are recognised as the reference's. :class:`SeamTrainer`: the trainer's own, but for the computation of text features.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel, text_module
from cocoop_fast.clip.load import amp_text_dtype
from cocoop_fast.engine.graphs import CudaGraphs, Recorded
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.evaluate import autocast
from cocoop_fast.integrations.recognise import differences
from cocoop_fast.integrations.text_seam import accelerate
from cocoop_fast.methods.cocoop import CustomCLIP
from cocoop_fast.methods.coop import CoOp
from cocoop_fast.training.precision import LossScaler, needs_loss_scaling
from cocoop_fast.training.step import Step, loss_and_gradients


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
        # What the replaced build_model would call.
        cfg, home = self.cfg, self.replaced.build_model.__globals__  # type: ignore[attr-defined]
        print(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME})")
        clip_model = home["load_clip_to_cpu"](cfg)
        self.precision: str = getattr(cfg.TRAINER, self.fast_model.learner.section).PREC
        if self.precision in ("fp16", "amp") and self.device.type == "cpu":
            print(
                f"PREC {self.precision} is computed in fp32 on a CPU"
            )  # as amp is there, whose autocast is of CUDA
            self.precision = "fp32"
        if self.precision != "fp16":
            clip_model.float()

        print(f"cocoop_fast: trainer {self.replaced.__name__} is the reference's, and computed whole")
        print("Building custom CLIP (cocoop_fast)")
        clip_model.to(self.device).requires_grad_(False)
        text_dtype = amp_text_dtype(self.precision, self.device)
        self.model = self.fast_model(cfg, self.dm.dataset.classnames, clip_model, text_dtype=text_dtype)
        learner = self.model.prompt_learner
        learner.saves_tokens = True  # so that the reference's strict resume reads what is written here
        print(f"Number of context words (tokens): {learner.n_ctx}")
        if cfg.MODEL.INIT_WEIGHTS:
            home["load_pretrained_weights"](learner, cfg.MODEL.INIT_WEIGHTS)
        self.model.to(self.device)
        self.optim = home["build_optimizer"](learner, cfg.OPTIM)
        check_learned(learner, self.optim)
        self.sched = home["build_lr_scheduler"](self.optim, cfg.OPTIM)
        self.register_model("prompt_learner", learner, self.optim, self.sched)

        self._parameters = list(learner.parameters())
        self.scaler = LossScaler(self.device, enabled=needs_loss_scaling(self.precision, True, self.device))
        self._step: Step = loss_and_gradients(self.model, self._parameters, self.precision, self.scaler)
        if self.device.type == "cuda":
            graphs = CudaGraphs(self.device)
            self._step = Recorded(self._step, print, graphs, self.model.why_not_recorded)
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
        self.scaler.step(self.optim, result.overflow)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        summary = {"loss": loss, "acc": 100.0 * correct / len(label)}
        return {name: summary[name] for name in self.logged}

    def after_train(self) -> None:
        """Test. Both wordings of the end are written: result parsers wait for the one or the other, and Dassl has one."""
        dassls = "".join(
            inspect.getsource(vars(kind)["after_train"])
            for kind in self.replaced.__mro__
            if "after_train" in vars(kind)
        )
        for line in ("Finished training", "Finish training"):
            if line not in dassls:
                print(line)
        super().after_train()  # type: ignore[misc]  # the replaced trainer's


class SeamTrainer:
    """The first base of a trainer that keeps its own model, loss and optimizer: the tree computes its text features.

    What is computed how is said once, after the model is built; of what could not be, why.
    """

    replaced: type
    differs: str  # from the reference, for the line that says so
    model: Any

    def build_model(self) -> None:
        """The replaced trainer's, and then a seam before its text encoder."""
        with _captured(self.replaced) as loaded:
            super().build_model()  # type: ignore[misc]  # the replaced trainer's
        name = f"trainer {self.replaced.__name__}"
        try:
            accelerate(self.model, _clip_of(self.model, loaded))
        except UserError as error:
            print(
                f"cocoop_fast: {name} is left alone, because {error}; {self.differs}. "
                "`cocoop_fast.TreeTextEncoder` can be called from its code"
            )
        else:
            print(
                f"cocoop_fast: {name} keeps its own model and loss, with text features by the tree; {self.differs}"
            )


def check_learned(learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises a UserError if a tensor that is to be learned is in no group of an optimizer, so that nothing would change it."""
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    missing = [name for name, one in learner.named_parameters() if one.requires_grad and id(one) not in held]
    if missing:
        raise UserError(
            f"build_optimizer leaves out {', '.join(missing)} of the prompt learner, which would never be learned; see "
            "OPTIM.STAGED_LR and OPTIM.NEW_LAYERS."
        )


def _clip_of(model: Any, loaded: Sequence[Any]) -> ClipModel:
    """The one of the CLIPs that were loaded whose text tower a model has.

    Raises:
        UserError: there is none, or the model is spread over several GPUs.
    """
    if isinstance(model, nn.DataParallel):
        raise UserError("it is spread over several GPUs (DataParallel; CUDA_VISIBLE_DEVICES=0 is one)")
    encoder = getattr(model, "text_encoder", None)
    if encoder is None:
        raise UserError("its model has no `text_encoder`")
    tower = getattr(encoder, "transformer", None)
    for clip_model in loaded:
        if tower is not None and tower is getattr(text_module(clip_model), "transformer", None):
            clip_model.to(
                next(encoder.parameters()).device
            )  # the embedding of tokens is no part of the encoder
            return clip_model
    raise UserError("its text encoder is not the text tower of the CLIP that it loads")


@contextmanager
def _captured(trainer: type) -> Iterator[list[Any]]:
    """The CLIPs that ``load_clip_to_cpu`` of a trainer's modules gives in the meantime."""
    loaded: list[Any] = []
    homes = {kind.__module__ for kind in trainer.__mro__}
    originals = {
        home: load for home in homes if (load := vars(sys.modules[home]).get("load_clip_to_cpu")) is not None
    }

    def capturing(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_clip_to_cpu(*arguments: Any, **named: Any) -> Any:
            loaded.append(load(*arguments, **named))
            return loaded[-1]

        return load_clip_to_cpu

    for home, load in originals.items():
        vars(sys.modules[home])["load_clip_to_cpu"] = capturing(load)
    try:
        yield loaded
    finally:
        for home, load in originals.items():
            vars(sys.modules[home])["load_clip_to_cpu"] = load


# By the name of the trainer that is replaced: its model, and what it logs of a step.
FAST_TRAINERS: dict[str, tuple[type[CoOp], tuple[str, ...]]] = {
    "CoCoOp": (CustomCLIP, ("loss",)),
    "CoOp": (CoOp, ("loss", "acc")),
}


@cache
def fast_trainer(name: str, replaced: type) -> type:
    """The class to use instead of a trainer that is registered as ``name``: itself if it loads no CLIP."""
    if not any("load_clip_to_cpu" in vars(sys.modules[kind.__module__]) for kind in replaced.__mro__):
        return replaced
    differing = differences(name, replaced)
    own: dict[str, Any] = {"replaced": replaced}
    if name in FAST_TRAINERS and not differing:
        model, logged = FAST_TRAINERS[name]
        own |= {"fast_model": model, "logged": logged, "__doc__": FastTrainer.__doc__}
        return type(replaced.__name__, (FastTrainer, replaced), own)
    own["differs"] = (
        f"not the reference's: {', '.join(differing)}"
        if name in FAST_TRAINERS
        else "it is not one of the reference's"
    )
    return type(replaced.__name__, (SeamTrainer, replaced), {**own, "__doc__": SeamTrainer.__doc__})
