"""Measure how long the others run on after a rank was killed or hangs: the table of docs/robustness.md.

    python tools/measure_ends_of_ranks.py [--times 10] [--case NAME ...]

Each time two ranks train on the digits; after their first steps one of them gets SIGKILL or SIGSTOP, and the clock runs
until no process is left. One line is printed a case.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

# Name: under torchrun, signal, rank.
CASES = {
    "torchrun, a rank is killed": (True, signal.SIGKILL, 1),
    "torchrun, a rank hangs": (True, signal.SIGSTOP, 1),
    "no launcher, a rank is killed": (False, signal.SIGKILL, 1),
    "no launcher, a rank hangs": (False, signal.SIGSTOP, 1),
    "no launcher, the first rank hangs": (False, signal.SIGSTOP, 0),
}
TRAIN = ["-m", "cocoop_fast", "train", "--quiet", "-o"]
FIELDS = ["optim.epochs", "1000", "print_freq", "1"]


@contextmanager
def ranks(torchrun: bool, output: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], dict[int, int]]]:
    """Two ranks that train: the processes that were started, and the ranks' numbers. Ended at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    train = [*TRAIN, str(output), *FIELDS]
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        commands = [([sys.executable, *launcher, *train], environment)]
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        commands = [([sys.executable, *train], {**environment, **meet, **one}) for one in own]
    started = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command, env in commands
    ]
    pids: dict[int, int] = {}
    try:
        wait_for_steps(output / "metrics.jsonl")
        parents = [one.pid for one in started]
        pids = children(parents[0]) if torchrun else dict(enumerate(parents))
        yield started, pids
    finally:
        for pid in (*pids.values(), *(one.pid for one in started if one.poll() is None)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for one in started:
            one.wait()


def wait_for_steps(file: Path) -> None:
    """Until a run has logged a few steps."""
    end = time.monotonic() + 300
    while not file.exists() or file.read_bytes().count(b'"step"') < 5:
        if time.monotonic() > end:
            raise TimeoutError("the ranks do not train")
        time.sleep(0.1)


def children(parent: int) -> dict[int, int]:
    """The numbers of a launcher's ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            environment = dict(
                pair.split(b"=", 1) for pair in (folder / "environ").read_bytes().split(b"\0") if b"=" in pair
            )
        except OSError:
            continue
        if b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(folder.name)
    return found


def running(pid: int) -> bool:
    """Whether a process is there and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def measure(torchrun: bool, number: signal.Signals, rank: int) -> float:
    """Seconds from the signal until the other rank, and the launcher if there is one, have ended."""
    with tempfile.TemporaryDirectory() as folder, ranks(torchrun, Path(folder) / "run") as (started, pids):
        begin = time.monotonic()
        os.kill(pids[rank], number)
        others = [pid for other, pid in pids.items() if other != rank]
        while any(map(running, [*others, *([started[0].pid] if torchrun else [])])):
            time.sleep(0.05)
        return time.monotonic() - begin


def main() -> None:
    """Print a line of the table a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--case", action="append", choices=[*CASES])
    arguments = parser.parse_args()
    for name in arguments.case or CASES:
        seconds = sorted(measure(*CASES[name]) for _ in range(arguments.times))
        told = " ".join(f"{one:.1f}" for one in seconds)
        print(f"| {name} | {told} | {median(seconds):.1f} | {seconds[-1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
