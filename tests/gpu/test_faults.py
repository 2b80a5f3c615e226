"""Faults on a GPU, for real: what tests/training/test_cuda_graphs.py lets a stub do, the driver does here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_runs import loaded_tiny_clip
from tiny_training import NAMES, Recorder, clip_model, make_batches

from cocoop_fast.config import OptimConfig, PromptConfig
from cocoop_fast.engine.graphs import WARM_UP_STEPS, CudaGraphs, Recorded
from cocoop_fast.methods import build_model
from cocoop_fast.training.precision import LossScaler
from cocoop_fast.training.step import StepResult, loss_and_gradients
from cocoop_fast.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda", 0)


def gpu_model():
    torch.manual_seed(1)
    loaded = replace(loaded_tiny_clip(), model=clip_model(torch.float32).to(GPU), device=GPU)
    return build_model(PromptConfig(), list(NAMES), loaded)


def result_of(x):
    return StepResult(x.sum()[None], (x * 2,))


def waits(x):
    float(x.sum())  # the host asks: not permitted while recording
    return result_of(x)


def runs_out_of_memory(x):
    torch.empty(2**50, dtype=torch.uint8, device=x.device)
    return result_of(x)


def memory_comes_back_from_another_stream():
    used = torch.cuda.memory_allocated()
    other = torch.empty(2**24, device=GPU)
    other.record_stream(torch.cuda.Stream())
    del other
    torch.cuda.synchronize()
    torch.empty(1, device=GPU)  # now the allocator looks
    return torch.cuda.memory_allocated() == used


@pytest.mark.parametrize("fault", [waits, runs_out_of_memory])
def test_the_device_is_as_before_after_a_recording_that_failed(fault):
    x = torch.ones(1000, device=GPU)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            CudaGraphs(GPU)(lambda: fault(x))
        assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
        assert float((x * 3).sum()) == 3000
        torch.randn(3, device=GPU)
        assert memory_comes_back_from_another_stream()
    _, replay = CudaGraphs(GPU)(lambda: result_of(x))  # one that can be recorded is
    replay()


def test_a_step_that_waits_is_launched_as_it_is():
    messages = []
    steps = Recorded(lambda x, label: waits(x), messages.append, CudaGraphs(GPU))
    for number in range(2 * WARM_UP_STEPS):
        x = torch.full((10,), float(number), device=GPU)
        assert float(steps(x, torch.zeros(1, device=GPU)).report) == 10.0 * number
    assert len(messages) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_second_gpu_records_its_own_launches():
    for device in (GPU, torch.device("cuda", 1)):
        with torch.cuda.device(device):
            x = torch.ones(1000, device=device)
            result, replay = CudaGraphs(device)(lambda x=x: result_of(x))
            for value in (1.0, 2.0):
                x.fill_(value)
                replay()
                assert float(result.report) == 1000 * value


def test_memory_that_runs_out_at_a_step_is_made_room_for():
    """Little is left of the GPU: recording fails or the step does, and the run ends all the same."""
    model, observer = gpu_model(), Recorder()
    trainer = Trainer(model, make_batches(24, 2), OptimConfig(epochs=1), observer=observer)
    step, calls = trainer._step, []

    def failing(features, label):
        calls.append(None)
        if len(calls) == WARM_UP_STEPS:
            torch.empty(2**50, dtype=torch.uint8, device=GPU)
        return step(features, label)

    trainer._step = failing
    trainer.fit()
    assert len(observer.steps) == 12 and any("smaller pieces" in one for one in observer.messages)


def test_a_graph_is_recorded_into_the_memory_of_the_steps_before():
    model = gpu_model()
    scaler = LossScaler(GPU, enabled=False)
    step = loss_and_gradients(model, list(model.prompt_learner.parameters()), "fp32", scaler)
    features, label = torch.randn(2, 64, device=GPU), torch.tensor([0, 2], device=GPU)
    step(features, label)
    pool = model.tree_encoder.tower.shared.training
    [warm] = pool._free
    _, replay = CudaGraphs(GPU)(lambda: step(features, label))
    assert replay.memory == [warm] and not pool._free
