"""Ranks that do a list of jobs on the tiny CLIP (run by the tests).

Usage: torchrun run_ranks.py JOBS.json prints a line of JSON with the first rank's answers. python run_ranks.py
LAUNCHES.json forks the ranks of one launch after the other, once everything is imported.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import load_few_test_images, loaded_tiny_clip, tiny_config
from tiny_training import large_model, make_batches, run_out_of_memory

from cocoop_fast.config import OptimConfig, PromptConfig
from cocoop_fast.distributed import heartbeat
from cocoop_fast.distributed.class_shards import share_classes
from cocoop_fast.distributed.launch import join
from cocoop_fast.distributed.ranks import ALONE, Ranks
from cocoop_fast.errors import UserError
from cocoop_fast.experiments import experiment, shared
from cocoop_fast.methods import build_model
from cocoop_fast.training.observer import Observer, StepInfo
from cocoop_fast.training.trainer import Trainer

NAMES = ["cat", "cat food", "dog", "golden retriever", "golden eagle", "eagle", "cat food bowl", "dog"]


class Stop(Exception):
    """Leaves a run between two steps."""


class Messages(Observer):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)


class Interrupt(Observer):
    """Leaves a run, or hurts one of its ranks, after so many steps."""

    def __init__(self, ranks: Ranks, job: dict[str, Any]) -> None:
        self.ranks, self.job = ranks, job

    def on_step(self, info: StepInfo) -> None:
        if info.step == self.job.get("stop_after"):
            raise Stop
        if info.step == self.job.get("hurt_after") and self.ranks.everyone.index == self.job["rank"]:
            Path(self.job["moment"]).write_text(f"{os.getpid()} {time.time()}")
            os.kill(os.getpid(), getattr(signal, self.job["signal"]))


def train(ranks: Ranks, job: dict[str, Any]) -> Any:
    """Train, evaluate and write a run directory."""
    config = tiny_config(Path(job["output"]), **job["fields"])
    try:
        return experiment.run(config, observer=Interrupt(ranks, job), ranks=ranks).rows[0].base
    except Stop:
        return "stopped"


def evaluate(ranks: Ranks, job: dict[str, Any]) -> Any:
    """Evaluate a run directory."""
    return {
        name: vars(one) for name, one in experiment.evaluate_run(Path(job["output"]), ranks=ranks).items()
    }


def gradients(ranks: Ranks, job: dict[str, Any]) -> Any:
    """How far loss, logits and the gradient of classes shared out are from those of the model by itself."""
    dtype = getattr(torch, job["dtype"])
    clip = loaded_tiny_clip()
    clip.model.to(dtype).logit_scale.data.fill_(3.0)
    torch.manual_seed(0)
    engine = dict(job.get("engine", {}))
    if (budget := engine.pop("float32_budget", None)) is not None:
        engine["memory_budget"] = budget * dtype.itemsize // 4
    whole = build_model(PromptConfig(**job["prompt"]), NAMES, clip, **{**engine, "memory_budget": None})
    parted = build_model(PromptConfig(**job["prompt"]), NAMES, clip, **engine)
    parted.prompt_learner.load_state_dict(whole.prompt_learner.state_dict())
    features, label = torch.randn(3, 64).to(dtype), torch.tensor([0, 3, 6])
    ranks = ranks.arranged("classes", 3)
    shared = share_classes(parted, ranks.classes)
    results = []
    for model, learner in ((whole, whole.prompt_learner), (shared, parted.prompt_learner)):
        loss, logits = model.loss_and_logits(features, label)
        gradient = torch.cat([one.flatten() for one in torch.autograd.grad(loss, [*learner.parameters()])])
        results.append((loss.detach()[None], logits, gradient, model.pruned))
    (loss, logits, gradient, pruned), (own_loss, own_logits, own_gradient, own_pruned) = results
    pairs = [(own_loss, loss), (own_logits, logits), (ranks.classes.sum(own_gradient), gradient)]
    if pruned is not None:
        assert own_pruned.classes_kept == pruned.classes_kept < len(NAMES)
    if "memory_budget" in engine:
        pieces = [piece for known in parted.tree_encoder.memory._known.values() for piece in known.values()]
        assert any(piece.images < len(features) for piece in pieces), "that much memory parts nothing"
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def short_of_memory(ranks: Ranks, job: dict[str, Any]) -> Any:
    """How far a run in which a rank lacks memory is from that of one process that has enough, and what was said."""
    ends, said = [], Messages()
    for group in (ALONE, ranks.arranged("classes", 4)):
        model = large_model()
        trainer = Trainer(model, make_batches(24, 4), OptimConfig(epochs=1), observer=said, ranks=group)
        with pytest.MonkeyPatch.context() as patch:
            if group.everyone.index == 1:  # forward, and then, in pieces, backward
                run_out_of_memory(patch, model, MemoryError(), job["times"])
            trainer.fit()
        ends.append(torch.cat([one.detach().flatten() for one in model.prompt_learner.parameters()]))
    return float((ends[0] - ends[1]).abs().max()), said.texts


def one_rank(jobs: list[dict[str, Any]]) -> int:
    heartbeat.INTERVAL = jobs[0].get("heartbeat", heartbeat.INTERVAL)
    try:
        with join() as ranks:
            answers = [globals()[job["do"]](ranks, job) for job in jobs]
        if ranks.is_first:
            print(json.dumps(answers), flush=True)
    except UserError as error:  # as the command line does
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    return 0


def fork(launch: dict[str, Any], told: Path) -> dict[str, Any]:
    """The jobs of a launch by ranks without torchrun, which would end the others when one dies.

    Returns:
        status: each rank's, negative where a signal ended it; told: what they wrote.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    count = launch["ranks"]
    os.environ.update(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    children = [_child(rank, launch["jobs"], told) for rank in range(count)]
    status = {}
    for _ in children:
        pid, code = os.waitpid(-1, 0)
        status[pid] = os.waitstatus_to_exitcode(code)
        for job in launch["jobs"]:
            if job.get("signal") == "SIGSTOP" and children[job["rank"]] not in status:
                os.kill(children[job["rank"]], signal.SIGKILL)  # it would sleep for ever
    return {"status": [status[pid] for pid in children], "told": told.read_text(), "ended": time.time()}


def _child(rank: int, jobs: list[dict[str, Any]], told: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    os.environ["RANK"] = str(rank)
    output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        code = one_rank(jobs)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> int:
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    clip, digits = loaded_tiny_clip(), load_few_test_images(tiny_config(Path()).data)
    digits.read(digits.train[0])  # imports what reads them
    shared.load_clip = lambda config: replace(clip, device=torch.device(config.device.replace("auto", "cpu")))
    shared.load_dataset = lambda config: digits
    if "RANK" in os.environ:
        return one_rank(work)
    folder = Path(sys.argv[1]).parent
    print(json.dumps({name: fork(launch, folder / f"{name}.txt") for name, launch in work.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
