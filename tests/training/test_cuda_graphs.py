"""Recording CUDA graphs where there is no GPU: a stub in torch's place fails as a driver does."""

from __future__ import annotations

import pytest
import torch
from stub_cuda import GPU_1, stub_of, untouched
from tiny_encoders import encoder
from tiny_training import Recorder, fast_model, large_model, make_batches, recipe, run_out_of_memory

from cocoop_fast.engine import graphs, pieces
from cocoop_fast.engine.graphs import WARM_UP_STEPS, CudaGraphs, Recorded
from cocoop_fast.training.step import StepResult
from cocoop_fast.training.trainer import Launching, Trainer

RESULT = StepResult(torch.zeros(4), ())


def test_the_stream_is_of_the_device_and_goes_before_the_encoders(monkeypatch):
    stub = stub_of(monkeypatch)
    seen = []

    def work():
        seen.append(dict(stub.current))
        return RESULT

    result, replay = CudaGraphs(GPU_1)(work)
    [during] = seen
    assert result is RESULT and untouched(stub)
    assert during["device"] == during["stream"].device == GPU_1
    assert during["stream"].priority < 0 and during["stream"].waited_for == "the caller's"
    replay()
    assert replay.graph.replays == 1


@pytest.mark.parametrize("fault", ["begin_fails", "end_fails"])
def test_a_recording_that_cannot_begin_or_end_leaves_the_callers_stream(monkeypatch, fault):
    stub = stub_of(monkeypatch, **{fault: True})
    with pytest.raises(RuntimeError, match="CUDA error"):
        CudaGraphs(GPU_1)(lambda: RESULT)
    assert untouched(stub) and stub.mended == 1


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_torch_has_what_mends_a_recording():
    assert callable(graphs._end_allocating) and callable(torch._C._cuda_releasePool)


@pytest.mark.parametrize("end_fails", [False, True])
def test_a_launch_that_cannot_be_recorded_ends_the_recording_and_is_the_reason(monkeypatch, end_fails):
    stub = stub_of(monkeypatch, end_fails=end_fails)

    def work():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream"):
        CudaGraphs(GPU_1)(work)
    assert untouched(stub) and stub.ends == 1 and stub.mended == end_fails


def test_a_graph_keeps_the_memory_that_the_steps_before_used(monkeypatch):
    """As they laid it out: the copies of layer 0's constants are no part of it. Nobody else gets it while the graph is there."""
    stub_of(monkeypatch)
    engine = encoder(backend="cpu")
    pool = engine.tower.shared.training
    ctx = torch.zeros(2, 4, engine.frozen.width, requires_grad=True)

    def step():
        engine(ctx).sum().backward()
        return RESULT

    step()
    [warm] = pool._free
    layout = warm.layout()
    _, replay = CudaGraphs(GPU_1)(step)
    assert warm.layout() is layout is not None
    assert len(replay.memory) == 1 and replay.memory[0] is warm and not pool._free
    addresses = warm.scratch.get("h", 1).data_ptr()
    step()
    assert pool._free and pool._free[0] is not warm
    assert warm.scratch.get("h", 1).data_ptr() == addresses


def test_passes_of_one_recording_that_follow_each_other_share_memory(monkeypatch):
    """A batch of an evaluation goes through in groups of images."""
    stub_of(monkeypatch)
    monkeypatch.setitem(pieces.ROWS_PER_INFERENCE_PASS, "cpu", 1)
    engine = encoder(backend="cpu")
    contexts, encode, passes = torch.zeros(3, 4, engine.frozen.width), engine.tower.encode, []
    engine.tower.encode = lambda rows: passes.append(rows) or encode(rows)
    with torch.no_grad():
        _, replay = CudaGraphs(GPU_1)(lambda: engine(contexts))
    assert len(passes) == 3 and len(replay.memory) == 1
    assert not engine.tower.shared.inference._free


def trainer_with(monkeypatch, model, observer, record=None, **options):
    launching = Launching(record=record or CudaGraphs(GPU_1))
    return Trainer(
        model, make_batches(32, 4), recipe(epochs=1, **options), observer=observer, launching=launching
    )


@pytest.mark.parametrize("fault", ["begin_fails", "end_fails"])
def test_a_run_goes_on_where_its_steps_cannot_be_recorded(monkeypatch, fault):
    losses = []
    for failing in (False, True):
        stub, observer = stub_of(monkeypatch, **{fault: True}), Recorder()
        record = None if failing else (lambda work: (_ for _ in ()).throw(RuntimeError("no graphs")))
        trainer_with(monkeypatch, fast_model(), observer, record).fit()
        assert untouched(stub) and len(observer.messages) == 1
        losses.append([step.loss for step in observer.steps])
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_out_of_memory_in_a_recording_goes_on_in_smaller_pieces(monkeypatch):
    """Recording fails for want of memory, and the plain step after it as well: then pieces, and no graph any more."""
    stub, observer = stub_of(monkeypatch), Recorder()
    trainer = trainer_with(monkeypatch, large_model(), observer)
    kind = type(trainer.model.tree_encoder.tower)
    encode, calls = kind.encode, []

    def failing(self, contexts, *rest):
        calls.append(stub.capturing)
        if stub.capturing or (any(calls) and calls.count(False) == WARM_UP_STEPS + 1):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, contexts, *rest)

    monkeypatch.setattr(kind, "encode", failing)
    trainer.fit()
    assert len(observer.steps) == 8 and untouched(stub) and stub.begins == 1
    assert "CUDA out of memory" in observer.messages[0] and "smaller pieces" in observer.messages[1]


def test_graphs_give_their_memory_back_when_memory_runs_out():
    steps = Recorded(lambda features, label: RESULT, print, lambda work: (work(), lambda: None))
    for _ in range(WARM_UP_STEPS + 1):
        steps(torch.zeros(2, 3), torch.zeros(2))
    assert len(steps._recordings) == 1
    steps.release()
    steps(torch.zeros(2, 3), torch.zeros(2))
    assert not steps._recordings


def test_what_waits_for_the_device_is_never_recorded(monkeypatch):
    """Pruning and shards; each is said once."""

    def forbidden(work):
        pytest.fail("it was recorded")

    observer = Recorder()
    model = fast_model()
    model.prune_mass = 0.01
    trainer_with(monkeypatch, model, observer, forbidden).fit()
    assert len(observer.messages) == 1 and "prune_mass" in observer.messages[0]

    observer = Recorder()
    trainer = trainer_with(monkeypatch, large_model(), observer, forbidden)
    run_out_of_memory(monkeypatch, trainer.model, torch.OutOfMemoryError("CUDA out of memory."), 2)
    trainer._graphs.release = lambda: None  # as in a run whose budget was small from the start
    trainer.fit()
    assert any("in shards" in message for message in observer.messages)
