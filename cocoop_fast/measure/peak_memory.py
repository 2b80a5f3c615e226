"""Peak memory of a contestant above the loaded model, each in a process of its own.

``python -m cocoop_fast.measure.peak_memory`` is that process: a request as JSON on stdin, bytes on stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from cocoop_fast.measure.contestants import BY_NAME
from cocoop_fast.measure.problem import ProblemSpec, build_problem


def peak_memory(spec: ProblemSpec, contestant: str, action: str = "step", threads: int | None = None) -> int:
    """Bytes that two runs of `action` take at their peak, beyond the model and the contestant's construction.

    Args:
        spec: what to compute.
        contestant: who, by name.
        action: "step" or "forward".
        threads: of torch and the engine; default: as many as here.

    Raises:
        RuntimeError: the process failed, for example for want of memory.
    """
    threads = threads or torch.get_num_threads()
    request = {"spec": asdict(spec), "contestant": contestant, "action": action, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise RuntimeError(f"memory of {contestant}: {reason}")
    return int(done.stdout.splitlines()[-1])


def _main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    spec = ProblemSpec(**{**request["spec"], "classes": tuple(request["spec"]["classes"])})
    contestant = BY_NAME[request["contestant"]]
    run = getattr(contestant.build(build_problem(spec)), request["action"])
    if contestant.compiled:
        run()  # the compiler's own memory is not the step's
    before = settled_memory()
    for _ in range(2):
        run()
    print(peak_since(before))


def peak_since(before: int) -> int:
    """Bytes that this process took at its peak since :func:`settled_memory` said how many it had."""
    return max(0, _status("VmHWM") - before)


def settled_memory() -> int:
    """Bytes of this process, after freed memory went back to the system and the peak so far was forgotten.

    Later use would otherwise hide in either.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; without it, the process's largest size ever."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


if __name__ == "__main__":
    _main()
