"""Train in a child process that is killed at random moments and started again (run by test_kill.py).

Usage: python kill_repeatedly.py <output folder> <kills> <epochs>. Children are forked once everything is imported
and CLIP is built, so that the kills fall into the run. Prints at each kill the steps done and the newest checkpoint's.
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

from cocoop_fast.experiments import experiment, shared
from cocoop_fast.runs import checkpoint
from cocoop_fast.training.observer import Observer, StepInfo


class Signal(Observer):
    """Writes a byte to a pipe at each step."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step(self, info: StepInfo) -> None:
        os.write(self.pipe, b".")


def start(output: Path, epochs: int) -> tuple[int, int]:
    """Start (or resume) the run in a forked process; its id, and a pipe with a byte a step."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            config = tiny_config(output, optim__epochs=epochs, checkpoint_steps=2)
            experiment.run(config, observer=Signal(writer))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


def finish(output: Path, epochs: int) -> None:
    pid, reader = start(output, epochs)
    while os.read(reader, 65536):  # a full pipe would hold it up
        pass
    _, status = os.waitpid(pid, 0)
    os.close(reader)
    if status:
        raise SystemExit(f"the run in {output} failed")


def main(output: Path, kills: int, epochs: int) -> None:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    clip = loaded_tiny_clip()
    digits = load_few_test_images(tiny_config(output).data)
    digits.read(digits.train[0])  # imports what reads them
    shared.load_clip = lambda config: clip
    shared.load_dataset = lambda config: digits
    finish(output / "whole", epochs)
    saved = 0
    for kill in range(kills):
        pid, reader = start(output / "killed", epochs)
        seen = b""
        if kill % 3:  # else it is probably still starting up
            for _ in range(random.randint(1, 5)):
                seen += os.read(reader, 1)
        time.sleep(random.uniform(0, 0.01))  # any moment of a step
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while rest := os.read(reader, 65536):
            seen += rest
        os.close(reader)
        done = saved + len(seen)
        newest = checkpoint.load_newest(output / "killed" / "checkpoints")
        saved = newest.step if newest else 0
        print("killed after", done, "steps, saved", saved, flush=True)
    finish(output / "killed", epochs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
