"""Who competes. A contestant is data: how it is built, how much it has to do, what it needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoop_fast.clip.frozen import TextWeights
from cocoop_fast.errors import UserError
from cocoop_fast.measure.baselines import (
    DenseCoOp,
    GemmFloor,
    PaddingFreeCLIP,
    TruncatedCLIP,
    dense_oracle,
)
from cocoop_fast.measure.cost import TreeCost, layout_on
from cocoop_fast.measure.problem import Problem
from cocoop_fast.measure.shared_rows import FlexCLIP, RadixCLIP, why_no_flex
from cocoop_fast.methods.cocoop import CustomCLIP
from cocoop_fast.ops.extensions import CPP

COOP_BATCH = 32  # the batch size that the reference trains CoOp with
SAVED_FLOATS = 23  # that autograd keeps of a row in a layer, in units of d: measured


class Runner(Protocol):
    """A contestant ready to run. A step is forward and backward to the gradients of everything learned."""

    def step(self) -> object: ...
    def forward(self) -> object: ...


class ModelRunner:
    """Runs a prompted CLIP from image features.

    Args:
        model: anything with a `prompt_learner` and `logits(features)`.
        features: (B, E).
        labels: (B,).
    """

    def __init__(self, model: Any, features: Tensor, labels: Tensor) -> None:
        self.model, self.features, self.labels = model, features, labels

    def step(self) -> Tensor:
        """Logits (B, K), with the gradients of the cross-entropy left in the prompt learner."""
        self.model.prompt_learner.zero_grad()
        logits: Tensor = self.model.logits(self.features)
        F.cross_entropy(logits, self.labels).backward()
        return logits.detach()

    def forward(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model.logits(self.features)
            return logits

    def results(self) -> dict[str, Tensor]:
        """Logits and gradients of one step, by name."""
        logits = self.step()
        learned = self.model.prompt_learner.named_parameters()
        gradients = {name: value.grad.clone() for name, value in learned if value.grad is not None}
        return {"logits": logits, **gradients}


@dataclass(frozen=True)
class Work:
    """What a contestant has to do for the whole batch. Weights are frozen: backward has a product for each of forward's."""

    rows: int  # rows that go through the layers
    forward_flops: float  # of its matrix multiplications; attention is left out (below 1 percent)
    saved_bytes: float = 0.0  # expected activations kept for backward, for deciding what fits

    @property
    def step_flops(self) -> float:
        return 2 * self.forward_flops


@dataclass(frozen=True)
class Contestant:
    """One way to compute a problem."""

    name: str
    title: str
    # Seconds of a step over those of its GEMMs, roughly: decides what is too slow to be tried.
    overhead: float
    build: Callable[[Problem], Runner]
    work: Callable[[Problem], Work]
    why_not: Callable[[Problem], str | None] = lambda problem: None
    compiled: bool = False  # for one shape, which takes a minute beyond the first step
    batch: int | None = None  # images a step, where it does not take the problem's batch
    oracle: str | None = "dense"  # whose results it must reproduce

    def seconds_per_batch(self, problem: Problem) -> float:
        """Factor from the time of one call to that of the problem's batch."""
        return 1.0 if self.batch is None else problem.spec.batch / self.batch


def linear_flops(
    weights: TextWeights, rows: int, *, last_rows: int | None = None, projected: int = 0
) -> float:
    """FLOPs of a forward pass's linear layers, nothing skipped but what is said.

    Args:
        weights: of the text tower.
        rows: R.
        last_rows: Q, rows with a query, an attention output and an MLP in the last layer; default R.
        projected: rows that go through the text projection.
    """
    block, last_rows = weights.blocks[0], rows if last_rows is None else last_rows
    keys = 2 * block.out_proj.weight.numel()  # keys and values
    behind = sum(one.weight.numel() for one in (block.in_proj, block.out_proj, block.fc, block.proj)) - keys
    layers = len(weights.blocks)
    of_layers = layers * rows * keys + ((layers - 1) * rows + last_rows) * behind
    return 2.0 * (of_layers + projected * weights.projection.weight.numel())


def _autograd_work(problem: Problem, rows: int, *, kept: float = 1.0, **skipped: int) -> Work:
    """Of torch's own operations over so many rows, which keep `kept` times what they usually do."""
    floats = rows * len(problem.weights.blocks) * SAVED_FLOATS * problem.weights.width
    return Work(rows, linear_flops(problem.weights, rows, **skipped), kept * 4.0 * floats)


def _padded_work(problem: Problem, tokens: int, batch: int) -> Work:
    prompts = batch * len(problem.tokens)
    return _autograd_work(problem, prompts * tokens, projected=prompts)


def _dense_work(problem: Problem) -> Work:
    return _padded_work(problem, problem.tokens.shape[1], problem.spec.batch)


def _coop_work(problem: Problem) -> Work:
    return _padded_work(problem, problem.tokens.shape[1], 1)


def _truncated_work(problem: Problem) -> Work:
    return _padded_work(problem, problem.longest, problem.spec.batch)


def _padding_free_work(problem: Problem) -> Work:
    prompts, rows = (problem.spec.batch * n for n in (len(problem.tokens), int(problem.lengths.sum())))
    return _autograd_work(problem, rows, kept=1.3, last_rows=prompts, projected=prompts)


def _shared_rows_work(problem: Problem, *, kept: float = 1.0) -> Work:
    batch, leaves = problem.spec.batch, len(problem.tree.leaves)
    rows, ends = batch * (1 + problem.tree.rows), batch * leaves
    return _autograd_work(problem, rows, kept=kept, last_rows=ends, projected=ends)


def _radix_work(problem: Problem) -> Work:
    """It keeps the copies of query, key and value, and attention's output for each of them."""
    copies = len(problem.tokens) * problem.longest / (1 + problem.tree.rows)
    return _shared_rows_work(problem, kept=1 + 4 * copies / SAVED_FLOATS)


def _engine_work(problem: Problem) -> Work:
    step = TreeCost(problem.weights, problem.tree, layout_on("cpu")).step(problem.spec.batch)
    return Work(step.rows, step.gemm_flops / 2, 1.15 * step.saved_bytes)


def _gathering_tree_work(problem: Problem) -> Work:
    """In torch's operations every row gathers the keys and values of its path."""
    work, kept = _engine_work(problem), 1 + 2 * problem.tree.max_depth / SAVED_FLOATS
    return replace(work, saved_bytes=_autograd_work(problem, work.rows, kept=kept).saved_bytes)


def _floor_work(problem: Problem) -> Work:
    rows = problem.spec.batch * problem.tree.rows
    return Work(rows, linear_flops(problem.weights, rows))


def _floor(problem: Problem) -> Runner:
    return GemmFloor(problem.weights, problem.spec.batch * problem.tree.rows)


def _run(make: Callable[[Problem], nn.Module]) -> Callable[[Problem], Runner]:
    return lambda problem: ModelRunner(make(problem), problem.features, problem.labels)


def tree_on(backend: str) -> Callable[[Problem], Runner]:
    """The class tree by a backend."""

    def make(problem: Problem) -> nn.Module:
        model = CustomCLIP(problem.cfg, problem.spec.classes, problem.clip_model, backend=backend)
        model.prompt_learner = problem.learner()
        return model

    return _run(make)


def _coop(problem: Problem) -> Runner:
    generator = torch.Generator().manual_seed(problem.spec.seed)
    features = torch.randn(COOP_BATCH, problem.features.shape[1], generator=generator)
    labels = torch.randint(len(problem.spec.classes), (COOP_BATCH,), generator=generator)
    model = dense_oracle(problem, DenseCoOp, conditional=False)
    return ModelRunner(model, features.to(problem.features), labels.to(problem.labels))


def _why_no_extension(problem: Problem) -> str | None:
    return "the C++ extension is not built" if CPP.why_unavailable() else None


def _why_no_compiler(problem: Problem) -> str | None:
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return None if found else "torch.compile needs a C++ compiler"


# From the slowest to the fastest.
CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("dense", "dense oracle, 77 tokens a prompt", 2.5, _run(dense_oracle), _dense_work),
    Contestant("truncated", "prompts cut to the longest", 2.0, _run(TruncatedCLIP), _truncated_work),
    Contestant(
        "truncated+compile",
        "the same under torch.compile",
        1.6,
        _run(partial(TruncatedCLIP, compiled=True)),
        _truncated_work,
        why_not=_why_no_compiler,
        compiled=True,
    ),
    Contestant("padding-free", "ragged batch of the prompts", 1.8, _run(PaddingFreeCLIP), _padding_free_work),
    Contestant("radix", "ragged batch, each row's layers once (RadixMLP)", 2.0, _run(RadixCLIP), _radix_work),
    Contestant(
        "tree+flex",
        "class tree, FlexAttention's block mask",
        1.8,
        _run(FlexCLIP),
        _shared_rows_work,
        why_not=why_no_flex,
    ),
    Contestant("tree+torch", "class tree, torch operations", 3.5, tree_on("torch"), _gathering_tree_work),
    Contestant(
        "engine", "class tree, C++ engine", 1.1, tree_on("cpu"), _engine_work, why_not=_why_no_extension
    ),
    Contestant("floor", "the tree's GEMMs alone, nothing skipped", 1.0, _floor, _floor_work, oracle=None),
    Contestant(
        "coop",
        f"the reference's CoOp, its batch of {COOP_BATCH} divided by {COOP_BATCH}",
        2.5,
        _coop,
        _coop_work,
        batch=COOP_BATCH,
        oracle="coop",
    ),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


def choose(only: list[str] | None = None, skip: list[str] | None = None) -> tuple[Contestant, ...]:
    """The contestants of these names, or all but those.

    Raises:
        UserError: an unknown name, or nobody left.
    """
    for name in [*(only or []), *(skip or [])]:
        if name not in BY_NAME:
            raise UserError(f"There is no contestant '{name}'; choose from {', '.join(BY_NAME)}.")
    chosen = tuple(c for c in CONTESTANTS if (not only or c.name in only) and c.name not in (skip or []))
    if not chosen:
        raise UserError("No contestant is left to measure; leave fewer out.")
    return chosen
