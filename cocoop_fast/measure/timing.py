"""Times that mean something on a busy machine: interleaved rounds, the best of several, and the spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs of the same thing."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """By linear interpolation between the runs."""
        return float(np.percentile(self.seconds, percent))

    def scaled(self, factor: float) -> Timing:
        return Timing(tuple(factor * seconds for seconds in self.seconds))

    def to_mapping(self) -> dict[str, float | int]:
        return {
            "best": self.best,
            "median": self.median,
            "p20": self.percentile(20),
            "p80": self.percentile(80),
            "rounds": len(self.seconds),
        }


def seconds_of(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    action()
    return clock() - start


def interleave(
    actions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    max_seconds: float,
    spent: Mapping[str, float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run all actions in turn, `rounds` times over, so that a slow minute of the machine hits all of them.

    Each round begins with another action. An action that has used up its time is left out of further rounds, but
    each runs at least once.

    Args:
        actions: what to time, warmed up, by name.
        rounds: how often.
        max_seconds: time for each action.
        spent: what actions have used of it already.
        clock: tells the seconds. With one thread, the process's own time hides what other programs do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    with _nothing_old_to_collect():
        for turn in range(rounds if names else 0):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                used = (spent or {}).get(name, 0.0) + sum(seconds[name])
                if seconds[name] and used + max(seconds[name]) > max_seconds:
                    continue
                gc.collect()
                seconds[name].append(seconds_of(actions[name], clock))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


@contextmanager
def _nothing_old_to_collect() -> Iterator[None]:
    """Collections pass over what is there now: going through all objects of torch's and ours takes a quarter of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
