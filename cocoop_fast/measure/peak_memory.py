"""Peak memory of a piece of work, measured in a process of its own, so that its peak is its own.

``python -m cocoop_fast.measure.peak_memory`` is that process: a call as JSON on stdin, its result as JSON on stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cocoop_fast.engine.memory import peak_of_process
from cocoop_fast.measure.contestants import BY_NAME
from cocoop_fast.measure.problem import ProblemSpec, build_problem


def peak_memory(spec: ProblemSpec, contestant: str, action: str = "step") -> int:
    """Bytes that two runs of `action` take at their peak, beyond the model and the contestant's construction.

    Args:
        spec: what to compute.
        contestant: who, by name.
        action: "step" or "forward".

    Raises:
        RuntimeError: the process failed, for example for want of memory.
    """
    try:
        return int(in_own_process(_peak_here, spec=asdict(spec), contestant=contestant, action=action))
    except RuntimeError as error:
        raise RuntimeError(f"memory of {contestant}: {error}") from None


def in_own_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """What a function returns in a new process, with as many threads as here.

    Args:
        function: at the top level of a file, which the process loads again.
        arguments: what JSON can hold, as must be the result.

    Raises:
        RuntimeError: the process failed; with the last line that it wrote.
    """
    request = [torch.get_num_threads(), inspect.getfile(function), function.__name__, arguments]
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(
            (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        )
    return json.loads(done.stdout.splitlines()[-1])


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


def peak_since(before: int) -> int:
    """Bytes that this process took at its peak since :func:`settled_memory` said how many it had."""
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; without it, the process's largest size ever."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return peak_of_process("cpu") or 0


def _peak_here(spec: Mapping[str, Any], contestant: str, action: str) -> int:
    who = BY_NAME[contestant]
    problem = build_problem(ProblemSpec(**{**spec, "classes": tuple(spec["classes"])}))
    run = getattr(who.build(problem), action)
    if who.compiled:
        run()  # the compiler's own memory is not the step's
    before = settled_memory()
    for _ in range(2):
        run()
    return peak_since(before)


if __name__ == "__main__":
    threads, file, name, arguments = json.load(sys.stdin)
    torch.set_num_threads(threads)
    print(json.dumps(runpy.run_path(file)[name](**arguments)))
