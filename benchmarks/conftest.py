"""Problems and contestants for the benchmarks; what every record says about its circumstances."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from short_set import NAMES, is_whole, table

from cocoop_fast.measure.compare import (
    assert_same,
    check_against_oracle,
    gemm_rate,
    predicted_seconds,
    why_too_large,
)
from cocoop_fast.measure.contestants import BY_NAME, Contestant, ModelRunner, Runner
from cocoop_fast.measure.machine import describe_machine, one_line
from cocoop_fast.measure.problem import (
    Problem,
    ProblemSpec,
    build_problem,
    imagenet_names,
    random_text_tower,
)
from cocoop_fast.measure.timing import seconds_of

# A record may take about this long to be measured, the floor before each round included.
TARGET_SECONDS = 6.0
MOST_ROUNDS = 10
# What is slower than this in one run is skipped; the tree and its floor matter more than the baselines' largest sizes.
LONGEST_BASELINE, LONGEST_TREE = 12.0, 20.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all benchmarks, not the short set: about a quarter of an hour"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Each benchmark is named while it runs. A short set ends with its own table, not with one of 20 columns."""
    config.option.verbose = config.option.verbose or 1
    if _is_short(config) and hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _is_short(config):
        return
    kept = {item.name: item for item in items if item.name in NAMES}
    config.hook.pytest_deselected(items=[item for item in items if item.name not in NAMES])
    items[:] = [kept[name] for name in NAMES if name in kept]


def _is_short(config: pytest.Config) -> bool:
    return not config.option.full and is_whole(config.args, config.option.keyword)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    lines = table(one.extra_info for one in measured)
    if not lines:
        return
    terminalreporter.section("best of all rounds, against the floor and against dense", bold=True)
    for line in lines:
        terminalreporter.write_line(line)
    terminalreporter.write_line(one_line(describe_machine()))
    if _is_short(config):
        terminalreporter.write_line(
            "--full measures other sizes, the forward pass, single operations and memory too."
        )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["cocoop_fast"] = describe_machine()


@pytest.fixture(scope="session")
def problem_of() -> Callable[[int, int], Problem]:
    """(K, B) to the first K ImageNet names with ViT-B/16's text tower."""
    tower = random_text_tower()

    @lru_cache(maxsize=2)  # tests come in the order of their sizes
    def make(k: int, b: int) -> Problem:
        return build_problem(ProblemSpec(imagenet_names(k), b), tower)

    return make


@pytest.fixture(scope="session")
def rate(problem_of: Callable[[int, int], Problem]) -> float:
    """FLOP/s of GEMMs here: decides what is skipped and how often the rest is measured."""
    return gemm_rate(problem_of(100, 1))


@pytest.fixture(scope="session")
def agreed() -> set[str]:
    """Contestants that were found to compute the same as the oracle."""
    return set()


@pytest.fixture
def measure(
    benchmark: Any, problem_of: Callable[[int, int], Problem], rate: float, agreed: set[str]
) -> Callable[[str, int, int, str], None]:
    """Measure a contestant's "step" or "forward", with the floor timed before every round."""

    def run(name: str, k: int, b: int, action: str) -> None:
        problem, contestant = problem_of(k, b), BY_NAME[name]
        seconds = predicted_seconds(contestant, problem, rate) / (1 if action == "step" else 2)
        _skip_what_does_not_fit(contestant, problem, seconds, action)
        runner = contestant.build(problem)
        _check(contestant, runner, problem, agreed)
        floor = BY_NAME["floor"].build(problem)
        floor_seconds: list[float] = []

        def time_floor() -> None:
            if name != "floor":
                floor_seconds.append(seconds_of(getattr(floor, action)))

        rounds = max(1, min(MOST_ROUNDS, int(TARGET_SECONDS / (2 * seconds))))
        benchmark.group = f"{action}, {k} classes, batch {b}"
        warmup = int(seconds < TARGET_SECONDS)  # where it takes seconds, its first-time costs do not matter
        benchmark.pedantic(getattr(runner, action), setup=time_floor, rounds=rounds, warmup_rounds=warmup)
        if benchmark.stats is None:  # --benchmark-disable
            return
        work, best = contestant.work(problem), benchmark.stats.stats.min
        flops = work.step_flops if action == "step" else work.forward_flops
        benchmark.extra_info |= {
            "contestant": name,
            "action": action,
            "classes": k,
            "batch": b,
            "rows": work.rows,
            "gemm_flops": flops,
            "gflops_per_second": flops / best / 1e9,
            "best_seconds": best,
            "floor_seconds": min(floor_seconds, default=best),
            "ratio_to_floor": best / min(floor_seconds, default=best),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
        }

    return run


def _skip_what_does_not_fit(contestant: Contestant, problem: Problem, seconds: float, action: str) -> None:
    reason = contestant.why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    # The one size that people know is worth the wait.
    known = len(problem.spec.classes) == 100 and problem.spec.batch == 1
    longest = LONGEST_TREE if contestant.name in ("engine", "floor") else LONGEST_BASELINE
    if seconds > longest and not known:
        pytest.skip(f"one run would take about {seconds:.0f} s")
    reason = why_too_large(contestant, problem) if action == "step" else None
    if reason is not None:
        pytest.skip(reason)


def _check(contestant: Contestant, runner: Runner, problem: Problem, agreed: set[str]) -> None:
    """Nobody is timed who computes something else."""
    if contestant.name in agreed or contestant.oracle is None:
        return
    if contestant.compiled:  # compiled for one shape: compare at that shape, with its uncompiled self
        twin = BY_NAME[contestant.name.partition("+")[0]].build(problem)
        assert isinstance(runner, ModelRunner) and isinstance(twin, ModelRunner)
        assert_same(contestant.name, runner.results(), twin.results())
    else:
        check_against_oracle(problem, [contestant])
    agreed.add(contestant.name)
