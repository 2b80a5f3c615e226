"""How long a CoCoOp run would have taken densely: a few steps of its own size, measured beside the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cocoop_fast.clip.load import resolve_device
from cocoop_fast.measure.compare import compare
from cocoop_fast.measure.contestants import choose
from cocoop_fast.measure.problem import ProblemSpec, build_problem
from cocoop_fast.protocols.run_cell import Outcome
from cocoop_fast.readable import readable_seconds, readable_time
from cocoop_fast.runs.directory import read_run

_ROUNDS = 3
_MAX_SECONDS = 20.0  # for each of the two


@dataclass(frozen=True)
class DenseTime:
    """Of one run's training.

    Args:
        run: its cell, in words.
        steps: that it made.
        seconds: that they took, images and all.
        engine, dense: seconds of a step of its size on random features, the best of a few; ``dense``: 77 tokens a prompt,
            as the reference computes it. ``None``: what was not measured.
        why: there is no ``dense``.
    """

    run: str
    steps: int
    seconds: float
    engine: float | None
    dense: float | None
    why: str = ""

    def __str__(self) -> str:
        if self.dense is None or self.engine is None:
            return f"The dense computation of {self.run} was not measured: {self.why}."
        return (
            f"The {self.steps:,} steps of {self.run} took {readable_time(self.seconds)}, images and all; the dense computation's "
            f"text towers alone would have taken {readable_time(self.steps * self.dense)}: {readable_seconds(self.dense)} a step "
            f"against {readable_seconds(self.engine)}, best of {_ROUNDS}."
        )


def dense_time(outcomes: Sequence[Outcome]) -> DenseTime | None:
    """Of the first finished run of CoCoOp; ``None`` without one.

    Raises:
        UserError: what the run left cannot be read.
    """
    outcome = next((o for o in outcomes if o.status == "finished" and o.cell.method == "cocoop"), None)
    if outcome is None:
        return None
    config, newest = read_run(outcome.cell.run_dir)
    device = resolve_device(config.model.device)
    if device.type != "cpu":
        why = f"it is measured on a CPU, and this was trained on {device} (tools/run_gpu_report.py measures on a GPU)"
        return DenseTime(str(outcome.cell), newest.step, newest.seconds, None, None, why)
    spec = ProblemSpec(
        tuple(newest.classnames), config.optim.batch_size, config.model.name, config.model.pretrained
    )
    compared = compare(
        build_problem(spec), choose(["dense", "engine"]), rounds=_ROUNDS, max_seconds=_MAX_SECONDS
    )
    engine, dense = (compared.results.get(name) for name in ("engine", "dense"))
    return DenseTime(
        str(outcome.cell),
        newest.step,
        newest.seconds,
        None if engine is None else engine.step.best,
        None if dense is None else dense.step.best,
        "; ".join(compared.notes.values()),
    )
