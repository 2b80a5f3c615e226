"""The extension under random calls while two threads change what it was given.

`make fuzz` runs the long one under the sanitizers, 200 seconds on each instruction set.
"""

from __future__ import annotations

import os
import time

import pytest
from fuzzed_ops import Fuzzer


def test_random_calls_end_or_are_refused(isa):
    counts = Fuzzer(seed=0).run(calls=500)
    assert {name.partition(": ")[2] for name in counts} == {"done", "refused"}


@pytest.mark.soak
def test_random_calls_for_long(isa):
    seconds, seed = float(os.environ.get("COCOOP_FAST_FUZZ_SECONDS", "200")), time.time_ns()
    print(f"seed {seed}")
    counts = Fuzzer(seed).run(seconds)
    done = sum(count for name, count in counts.items() if name.endswith("done"))
    print(f"{isa}: {seconds:.0f} s, {counts.total()} calls, {done} of them done")
    names = {name.partition(":")[0] for name in counts}
    assert len(names) == 21
    missing = [name for name in names for end in ("done", "refused") if not counts[f"{name}: {end}"]]
    assert not missing, f"never seen: {missing}"
