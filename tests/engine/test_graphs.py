"""Recording and replaying steps, with a recorder that runs on a CPU as a CUDA graph does on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cocoop_fast.engine.graphs import MOST_GRAPHS, WARM_UP_STEPS, Recorded
from cocoop_fast.training.step import StepResult


class FakeGraphs:
    """Records by keeping the work: its result has no content until it is replayed, and then always the same memory."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1
        result = work()
        tensors = [result.report, *(g for g in result.gradients if g is not None)]
        for tensor in tensors:
            tensor.fill_(torch.nan)

        def replay():
            self.replayed += 1
            fresh = work()
            values = [fresh.report, *(g for g in fresh.gradients if g is not None)]
            for memory, value in zip(tensors, values, strict=True):
                memory.copy_(value)

        return result, replay


class Quadratic:
    """A step whose result says which inputs it saw, and which parameter."""

    def __init__(self):
        self.parameter = torch.ones(3)
        self.calls = 0

    def __call__(self, features: Tensor, label: Tensor) -> StepResult:
        self.calls += 1
        residual = (features @ self.parameter) - label
        return StepResult(residual.square().mean()[None], (residual @ features, None))


def inputs(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, generator=generator), torch.randint(9, (batch,), generator=generator)


def same(result, expected):
    return (
        result.report.equal(expected.report)
        and result.gradients[0].equal(expected.gradients[0])
        and result.gradients[1] is expected.gradients[1] is None
    )


def test_replays_equal_plain_steps_for_changing_inputs_shapes_and_parameters():
    graphs, step, plain, messages = FakeGraphs(), Quadratic(), Quadratic(), []
    recorded = Recorded(step, messages.append, graphs)
    for number in range(30):
        batch = 2 if number % 5 == 4 else 4
        features, label = inputs(batch, number)
        for one in (step, plain):
            one.parameter.fill_(1 + number)  # updated in place, as an optimizer does
        assert same(recorded(features, label), plain(features, label)), number
    assert graphs.recorded == 2  # one a batch size
    assert graphs.replayed == 30 - 2 * WARM_UP_STEPS
    assert messages == []


def test_the_inputs_are_copied_and_the_result_stays_in_place():
    recorded = Recorded(Quadratic(), print, FakeGraphs())
    results = []
    for number in range(WARM_UP_STEPS + 3):
        features, label = inputs(4, number)
        results.append(recorded(features, label))
        before = results[-1].report.clone()
        features.zero_()
        assert results[-1].report.equal(before)
    addresses = {result.report.data_ptr() for result in results[WARM_UP_STEPS:]}
    assert len(addresses) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nmore"), torch.cuda.OutOfMemoryError()]
)
def test_what_cannot_be_recorded_is_done_as_it_is_and_said_once(error):
    def refuse(work):
        work()
        raise error

    step, plain, messages = Quadratic(), Quadratic(), []
    recorded = Recorded(step, messages.append, refuse)
    for number in range(10):
        features, label = inputs(4 if number < 7 else 2, number)
        assert same(recorded(features, label), plain(features, label))
    assert step.calls == 10 + 1  # it was tried once
    [message] = messages
    assert "operation not permitted)" in message or "OutOfMemoryError)" in message


def test_a_bug_in_a_step_is_not_taken_for_a_refusal():
    recorded = Recorded(Quadratic(), print, lambda work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for number in range(WARM_UP_STEPS + 1):
            recorded(*inputs(4, number))


def test_the_number_of_graphs_is_bounded():
    graphs, step, plain, messages = FakeGraphs(), Quadratic(), Quadratic(), []
    recorded = Recorded(step, messages.append, graphs)
    for number in range(8 * (MOST_GRAPHS + 2)):
        features, label = inputs(1 + number % (MOST_GRAPHS + 2), number)
        assert same(recorded(features, label), plain(features, label))
    assert graphs.recorded == MOST_GRAPHS
    assert len(messages) == 1 and f"{MOST_GRAPHS} batch sizes" in messages[0]
