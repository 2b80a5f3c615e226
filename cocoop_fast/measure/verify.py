"""The equivalence certificate: what the fast engine computes, beside what the dense oracle does, both against float64.

Truth is the dense oracle (:mod:`cocoop_fast.reference`) in float64. A fast path may be as far from it as the dense path
is at the same precision, times ``FACTOR``, and never has to be nearer than ``FLOOR``: both round, in different orders.
Nothing passes that is further than ``MOST``, however far the dense path itself is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.clip.load import to_low_precision
from cocoop_fast.config import OptimConfig
from cocoop_fast.measure import devices
from cocoop_fast.measure.compare import TOLERANCE, relative_error
from cocoop_fast.measure.problem import Problem
from cocoop_fast.methods.cocoop import CustomCLIP
from cocoop_fast.methods.consistency import WEIGHTS, Consistency
from cocoop_fast.methods.zeroshot import ensemble_templates
from cocoop_fast.ops.table import BACKENDS
from cocoop_fast.reference import (
    DenseConsistency,
    DensePromptedCLIP,
    encode_prompts,
    ensemble_features,
    place_contexts,
)
from cocoop_fast.training.optimizer import build_optimizer
from cocoop_fast.training.precision import LossScaler, needs_loss_scaling
from cocoop_fast.training.step import Step, loss_and_gradients

DTYPES = {"fp64": torch.float64, **devices.DTYPES}

FACTOR = 4.0
# In float64 both paths are exact but for rounding; below, the benchmark's own bound.
FLOOR = {"fp64": 1e-10, "fp32": TOLERANCE, "fp16": TOLERANCE, "bf16": TOLERANCE}
MOST = 0.5


@dataclass(frozen=True)
class Errors:
    """Maximal errors against float64, each relative to the largest element of what is compared.

    ``parameters`` and ``losses`` are those after, and during, some training steps; the error of the parameters is
    relative to how far training moved them.
    """

    logits: float
    loss: float
    gradients: float
    losses: float
    parameters: float


@dataclass(frozen=True)
class Contestant:
    """One way to compute a problem.

    ``build`` gets the problem with its CLIP model already on the device and in the precision, and returns a model
    with the problem's learned parameters. The dense ones are what the others may be compared with.
    """

    name: str
    precision: str
    build: Callable[[Problem], Any]
    dense: bool = False


@dataclass(frozen=True)
class Verdict:
    """A contestant's errors, and those that it may have (``None``: it is what the others are compared with)."""

    contestant: Contestant
    errors: Errors
    allowed: Errors | None

    @property
    def within(self) -> bool:
        return not self.outside()

    def outside(self) -> list[tuple[str, float, float]]:
        """Name, error and bound of what is too far off; what is not a number is."""
        if self.allowed is None:
            return []
        pairs = ((name, error, getattr(self.allowed, name)) for name, error in asdict(self.errors).items())
        return [(name, error, most) for name, error, most in pairs if not error <= most]


def contestants(
    device: torch.device, precisions: Iterable[str], backends: Iterable[str] = ()
) -> Iterator[Contestant]:
    """The dense oracle in each precision, followed by every backend that can serve it on the device.

    Args:
        device: where all of it is computed.
        precisions: keys of ``DTYPES``.
        backends: only these; none: all.
    """
    chosen = set(backends)
    for precision in precisions:
        if precision != "fp64":
            yield Contestant("dense", precision, build_dense, dense=True)
        for backend in BACKENDS:
            if (not chosen or backend.name in chosen) and backend.refusal(device, DTYPES[precision]) is None:
                yield Contestant(backend.name, precision, _fast(backend.name))


def verify(
    problem: Problem,
    contestants: Iterable[Contestant],
    *,
    device: torch.device,
    steps: int = 3,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Verdict]:
    """Compare each contestant with the dense oracle in float64.

    A dense contestant has to come before the others of its precision, whose bounds it sets.

    Args:
        problem: model, classes, image features (B, E), labels and the parameters to start from.
        contestants: whom to compare.
        device: where.
        steps: training steps, by the paper's optimizer, each on a batch of its own.
        tell: told what is about to be computed.
    """
    batches = _batches(problem, steps)
    tell("the dense oracle in fp64")
    truth = _compute(build_dense(_at(problem, "fp64", device)), "fp64", device, batches)
    own: dict[str, Errors] = {}
    verdicts = []
    for contestant in contestants:
        tell(f"{contestant.name} in {contestant.precision}")
        precision = contestant.precision
        model = contestant.build(_at(problem, precision, device))
        errors = _errors(_compute(model, precision, device, batches), truth)
        if contestant.dense:
            own[precision] = errors
            verdicts.append(Verdict(contestant, errors, None))
        else:
            verdicts.append(Verdict(contestant, errors, _allowed(precision, own.get(precision))))
    return verdicts


@torch.no_grad()
def distance(one: Problem, other: Problem, device: torch.device) -> float:
    """How far the logits of the dense oracle in float64 lie apart, relative to the largest: of two activations, say."""
    logits = []
    for problem in (one, other):
        here = _at(problem, "fp64", device)
        model = build_dense(here)
        logits.append(model.logits(here.features.to(model.dtype)).cpu())
    return relative_error(logits[1], logits[0])


@dataclass(frozen=True)
class PruningError:
    """What tail pruning changes, by the worst of some batches."""

    contestant: Contestant
    gradients: float  # of all parameters together, in the Euclidean norm, relative to the exact ones
    share_left_out: float  # of the weights, as `cocoop_fast.engine.pruning` counts it
    classes_kept: int


def measure_pruning(
    problem: Problem,
    contestants: Iterable[Contestant],
    tau: float,
    *,
    device: torch.device,
    batches: int = 3,
) -> list[PruningError]:
    """Compare the gradients of each engine with and without pruning.

    Args:
        problem, device: as for :func:`verify`.
        contestants: the dense ones, which do not prune, are passed over.
        tau: `prune_mass`.
        batches: how many, each of its own images.
    """
    found = []
    for contestant in contestants:
        if contestant.dense:
            continue
        model = contestant.build(_at(problem, contestant.precision, device))
        parameters = list(model.prompt_learner.parameters())
        step, _ = _step_of(model, parameters, contestant.precision, device)
        errors, shares, kept = [], [], []
        for features, label in _batches(problem, batches):
            gradients = []
            for model.prune_mass in (0.0, tau):
                result = step(features.to(device, model.dtype), label.to(device))
                parts = [one.double().flatten() for one in result.gradients if one is not None]
                gradients.append(torch.cat(parts))
            exact, pruned = gradients
            errors.append(float((pruned - exact).norm() / exact.norm().clamp_min(1e-30)))
            shares.append(model.pruned.share_left_out)
            kept.append(model.pruned.classes_kept)
        found.append(PruningError(contestant, max(errors), max(shares), max(kept)))
    return found


def build_dense(problem: Problem, prompts_at_once: int = 64) -> DensePromptedCLIP:
    """The oracle with the problem's parameters, computed by parts of the class list.

    Activations are not kept but computed again, so that any class list fits into memory. In float16 and bfloat16 what
    is learned has that type as well, as in the reference.
    """
    clip_model, spec = problem.clip_model, problem.spec
    dtype = FrozenCLIP(clip_model).dtype
    model = _DenseByParts(clip_model, spec.classes, ctx_init=spec.ctx_init, attributes=spec.attributes)
    model.dtype, model.embedding = dtype, model.embedding.to(dtype)
    model.prompt_learner.to(dtype)
    model.prompts_at_once = prompts_at_once
    near = _consistency(problem)
    if near is not None:
        features = ensemble_features(clip_model, problem.spec.classes, near.templates)
        model.consistency = DenseConsistency(features, near.distance, near.text_weight, near.logit_weight)
    return _start(model, problem)


def _fast(backend: str) -> Callable[[Problem], CustomCLIP]:
    def build(problem: Problem) -> CustomCLIP:
        names, clip_model = problem.spec.classes, problem.clip_model
        model = CustomCLIP(problem.cfg, names, clip_model, backend=backend)
        near = _consistency(problem)
        if near is not None:
            model.keep_near(partial(near.anchor, clip_model=clip_model), names)
        started: CustomCLIP = _start(model, problem)
        return started

    return build


def _consistency(problem: Problem) -> Consistency | None:
    """What a run has by default: the published weights, the reference's seven templates."""
    distance = problem.spec.consistency
    if distance == "none":
        return None
    return Consistency(distance, *WEIGHTS[distance], ensemble_templates("select", ""))


def _start(model: Any, problem: Problem) -> Any:
    model.prompt_learner.load_state_dict(problem.learned, strict=False)
    model.prompt_learner.train()
    return model


class _DenseByParts(DensePromptedCLIP):
    """The same, with memory for the activations of a few prompts only."""

    prompts_at_once: int

    def text(self, x: Tensor) -> Tensor:
        ctx = self.prompt_learner.context(x)
        firsts = range(0, len(self.tokens), self.prompts_at_once)
        text = torch.cat([checkpoint(self._part, ctx, first, use_reentrant=False) for first in firsts])
        return text / text.norm(dim=-1, keepdim=True)

    def _part(self, ctx: Tensor, first: int) -> Tensor:
        part = slice(first, first + self.prompts_at_once)
        tokens = self.tokens[part]
        ctx = ctx.expand(len(tokens), -1, -1)
        prompts = place_contexts(self.embedding[part], ctx, self.name_lens[part], self.class_position)
        return encode_prompts(self.clip_model, prompts, tokens)


# -- what is compared --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Results:
    """In float64, on the CPU."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    losses: Tensor  # of each training step
    moved: dict[str, Tensor]  # parameters, by all steps together


def _compute(
    model: Any, precision: str, device: torch.device, batches: list[tuple[Tensor, Tensor]]
) -> _Results:
    """Logits and loss, and some training steps by the very pieces that a run trains with."""
    named = dict(model.prompt_learner.named_parameters())
    start = _plain(named)
    step, scaler = _step_of(model, list(named.values()), precision, device)
    optimizer = build_optimizer(list(named.values()), OptimConfig(), fused=device.type == "cuda")
    gradients: dict[str, Tensor] = {}
    losses = []
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        with torch.no_grad():
            features, label = (part.to(device) for part in batches[0])
            loss, logits = model.loss_and_logits(features.to(model.dtype), label)
        for features, label in batches:
            # A step that is skipped is made again, so that all make the same ones. At a scale of 1 it is not the scale's fault.
            skipped = True
            while skipped:
                result = step(features.to(device, model.dtype), label.to(device))
                pairs = zip(named, result.gradients, strict=True)
                computed = {name: gradient for name, gradient in pairs if gradient is not None}
                for name, parameter in named.items():
                    parameter.grad = computed.get(name)
                scale = float(scaler.current())
                plain = _plain(computed, 1 / scale)
                scaler.step(optimizer, result.overflow)
                skipped = 1 < scale > float(scaler.current())
            gradients = gradients or plain
            losses.append(result.report[0].double().cpu())
    return _Results(
        logits=logits.double().cpu(),
        loss=loss.double().cpu(),
        gradients=gradients,
        losses=torch.stack(losses),
        moved={name: value - start[name] for name, value in _plain(named).items()},
    )


def _step_of(
    model: Any, parameters: list[Tensor], precision: str, device: torch.device
) -> tuple[Step, LossScaler]:
    """What a run computes gradients with."""
    scaled = needs_loss_scaling(precision, parameters[0].dtype != model.dtype, device)
    scaler = LossScaler(device, enabled=scaled)
    return loss_and_gradients(model, parameters, precision, scaler), scaler


def _errors(results: _Results, truth: _Results) -> Errors:
    return Errors(
        logits=relative_error(results.logits, truth.logits),
        loss=relative_error(results.loss, truth.loss),
        gradients=_largest_error(results.gradients, truth.gradients),
        losses=relative_error(results.losses, truth.losses),
        parameters=_largest_error(results.moved, truth.moved),
    )


def _largest_error(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    if results.keys() != truth.keys():
        raise ValueError(f"gradients of {sorted(results)}, expected of {sorted(truth)}")
    errors = torch.tensor([relative_error(results[name], truth[name]) for name in truth])
    return float(errors.max())  # of a tensor, for which a NaN is the largest


def _allowed(precision: str, dense: Errors | None) -> Errors:
    floor = FLOOR[precision]
    own = asdict(dense) if dense is not None else {}
    # One number more, of the same kind as those of the steps: that it came out right by chance says nothing.
    own["loss"] = max(own.get("loss", 0.0), own.get("losses", 0.0))
    bounds = (max(floor, FACTOR * own.get(one.name, 0.0)) for one in fields(Errors))
    return Errors(*(min(bound, MOST) for bound in bounds))


# -- the problem, elsewhere --------------------------------------------------------------------------------------


def _at(problem: Problem, precision: str, device: torch.device) -> Problem:
    """The same on a device and in a precision; what is learned starts from the same values."""
    model: nn.Module = copy.deepcopy(problem.clip_model)
    convert = to_low_precision if precision in ("fp16", "bf16") else nn.Module.to
    convert(model, DTYPES[precision])
    return replace(problem, clip_model=model.to(device), features=problem.features.to(device))


def _batches(problem: Problem, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The problem's own batch first."""
    generator = torch.Generator().manual_seed(problem.spec.seed + 1)
    batches = [(problem.features, problem.labels)]
    for _ in range(steps - 1):
        features = torch.randn(problem.features.shape, generator=generator)
        labels = torch.randint(len(problem.spec.classes), problem.labels.shape, generator=generator)
        batches.append((features, labels))
    return batches


def _plain(named: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    return {name: value.detach().double().cpu() * factor for name, value in named.items()}
