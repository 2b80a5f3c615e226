"""CoCoOp at the price of CoOp: an image of CoCoOp here, against an image of CoOp as the reference trains it.

The reference's CoOp encodes the K prompts, 77 tokens each, once for a batch of 32 images, since no image changes them.
Its price of an image is that step divided by 32.
"""

import pytest

from cocoop_fast.measure.compare import check_against_oracle
from cocoop_fast.measure.contestants import BY_NAME, COOP_BATCH
from cocoop_fast.measure.timing import seconds_of


@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize("k", [10, 100])
def test_coop_price(benchmark, problem_of, k, b):
    problem, engine = problem_of(k, b), BY_NAME["engine"]
    reason = engine.why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    check_against_oracle(problem, [engine, BY_NAME["coop"]])
    coop, runner = BY_NAME["coop"].build(problem), engine.build(problem)
    if k < 100:
        coop.step()  # where it takes seconds, its first-time costs do not matter
    coop_seconds = []

    def time_coop():
        if len(coop_seconds) < (3 if k < 100 else 1):
            coop_seconds.append(seconds_of(coop.step))

    benchmark.group = f"price of CoOp, {k} classes"
    benchmark.pedantic(runner.step, setup=time_coop, rounds=5, warmup_rounds=1)
    if benchmark.stats is not None:
        coop_image, image = min(coop_seconds) / COOP_BATCH, benchmark.stats.stats.min / b
        benchmark.extra_info |= {
            "classes": k,
            "batch": b,
            "seconds_per_image": image,
            "coop_seconds_per_image": coop_image,
            "price": image / coop_image,
        }
