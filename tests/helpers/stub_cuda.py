"""Recorders of CUDA graphs where there is no GPU: one that fails as a driver does, and one that works on a CPU."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from cocoop_fast.engine import graphs

GPU_1 = torch.device("cuda", 1)


class FakeGraphs:
    """Records by keeping the work: its result, a tensor, has no content until it is replayed, and then always the same memory."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1
        logits = work().fill_(torch.nan)

        def replay():
            self.replayed += 1
            logits.copy_(work())

        return logits, replay


class StubCuda:
    """What of torch.cuda recording needs. A graph is empty unless it records a stream of its own device."""

    def __init__(self, begin_fails=False, end_fails=False):
        self.fails = {"begin": begin_fails, "end": end_fails}
        self.current = {"device": torch.device("cuda", 0), "stream": "the caller's"}
        self.capturing = False
        self.ends = self.begins = self.mended = 0
        stub = self

        class Stream:
            def __init__(self, device, priority=0):
                self.device, self.priority = device, priority

            def wait_stream(self, other):
                self.waited_for = other

        class CUDAGraph:
            replays = 0

            def capture_begin(self, pool, capture_error_mode):
                assert pool == "a pool" and capture_error_mode == "thread_local" and not stub.capturing
                if stub.fails["begin"]:
                    raise RuntimeError("CUDA error: initialization error")
                stub.begins += 1
                stub.capturing, self.stream = True, stub.current["stream"]

            def capture_end(self):
                if not stub.capturing:
                    raise RuntimeError(
                        "CUDA error: the operation is not permitted on a stream that is not capturing"
                    )
                stub.ends += 1
                stub.capturing = False
                if stub.fails["end"]:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

            def replay(self):
                self.replays += 1

        self.Stream, self.CUDAGraph = Stream, CUDAGraph

    @contextmanager
    def _as(self, name, value):
        before = self.current[name]
        self.current[name] = value
        try:
            yield
        finally:
            self.current[name] = before

    def device(self, device):
        return self._as("device", device)

    def stream(self, stream):
        return self._as("stream", stream)

    def current_stream(self, device):
        return self.current["stream"]

    def graph_pool_handle(self):
        return "a pool"

    def mend(self, graph, pool):
        assert isinstance(graph, self.CUDAGraph) and pool == "a pool" and not self.capturing
        self.mended += 1

    def synchronize(self, device):
        assert not self.capturing

    def empty_cache(self):
        assert not self.capturing


def stub_of(monkeypatch, **fails):
    stub = StubCuda(**fails)
    monkeypatch.setattr(graphs, "cuda", stub)
    monkeypatch.setattr(graphs, "_mend", stub.mend)
    return stub


def untouched(stub):
    return not stub.capturing and stub.current == {
        "device": torch.device("cuda", 0),
        "stream": "the caller's",
    }
