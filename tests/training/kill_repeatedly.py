"""Train in a child process that is killed at random moments and started again (run by test_kill.py).

Usage: python kill_repeatedly.py <output folder> <kills>. Children are forked once everything is imported
and CLIP is built, so that the kills fall into the run. Prints the newest checkpoint at each kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from tiny_runs import load_few_test_images, loaded_tiny_clip, tiny_config

from cocoop_fast.training import experiment
from cocoop_fast.training.observer import Observer, StepInfo


class Signal(Observer):
    """Writes a byte to a pipe at each step."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step(self, info: StepInfo) -> None:
        os.write(self.pipe, b".")


def start(output: Path) -> tuple[int, int]:
    """Start (or resume) the run in a forked process; its id, and a pipe with a byte a step."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            config = tiny_config(output, optim__epochs=6, checkpoint_steps=2)
            experiment.run(config, observer=Signal(writer))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


def finish(output: Path) -> None:
    pid, reader = start(output)
    _, status = os.waitpid(pid, 0)
    os.close(reader)
    if status:
        raise SystemExit(f"the run in {output} failed")


def main(output: Path, kills: int) -> None:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    clip = loaded_tiny_clip()
    digits = load_few_test_images(tiny_config(output).data)
    digits.read(digits.train[0])  # imports what reads them
    experiment.load_clip = lambda config: clip
    experiment.load_dataset = lambda config: digits
    finish(output / "whole")
    for kill in range(kills):
        pid, reader = start(output / "killed")
        if kill % 3:  # else it is probably still starting up
            for _ in range(random.randint(1, 5)):
                os.read(reader, 1)
        time.sleep(random.uniform(0, 0.01))  # any moment of a step
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        newest = max((output / "killed" / "checkpoints").glob("*.pt"), default=None)
        print("killed at", newest.stem if newest else "start", flush=True)
    finish(output / "killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
