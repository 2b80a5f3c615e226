"""A step recorded as a CUDA graph: hundreds of small launches become one.

The class tree is fixed, so a step's shapes depend on the batch size alone, and with few classes its kernels run
shorter than their launches take. The optimizer stays outside of the graph: it is one fused kernel, and outside its learning
rate may change and its loss scaler may skip it without recording anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from cocoop_fast.training.step import Step, StepResult

# Steps of a shape that are done without a graph first: they compile kernels and let libraries allocate
# their workspaces, neither of which can be recorded.
WARM_UP_STEPS = 3

# Each graph holds the activations of its batch size. A run has one size, and a second where the last batch is smaller.
MOST_GRAPHS = 4

Record: TypeAlias = Callable[[Callable[[], StepResult]], tuple[StepResult, Callable[[], None]]]


def record_cuda_graph(work: Callable[[], StepResult]) -> tuple[StepResult, Callable[[], None]]:
    """Record the launches of ``work`` on the current device, without running them.

    Returns:
        Its result, whose memory has no content yet, and a function that fills it by running the launches again
        with what the inputs' memory then holds.
    """
    graph = torch.cuda.CUDAGraph()
    # "thread_local": a data loader may pin memory in another thread meanwhile, which is no business of the graph.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay


class RecordedSteps:
    """A :data:`Step` that records another one, once for each shape of its inputs, and replays it.

    What it returns is overwritten by the next step of the same shape. Weights of the model may not be replaced
    between steps; the parameters it learns are read anew by each.

    Args:
        step: without host synchronisation and data-dependent shapes. One that cannot be recorded is done as it is.
        on_message: told, once, why steps are not recorded.
        record: how work is recorded.
    """

    def __init__(
        self, step: Step, on_message: Callable[[str], None], record: Record = record_cuda_graph
    ) -> None:
        self._step = step
        self._on_message = on_message
        self._record = record
        self._recordings: dict[Hashable, _Recording] = {}
        self._seen: Counter[Hashable] = Counter()
        self._given_up = False

    def __call__(self, features: Tensor, label: Tensor) -> StepResult:
        shape = (features.shape, features.dtype, label.shape)
        self._seen[shape] += 1
        if self._seen[shape] > WARM_UP_STEPS and not self._given_up and shape not in self._recordings:
            self._make(shape, features.clone(), label.clone())
        recording = self._recordings.get(shape)
        if recording is None:
            return self._step(features, label)
        recording.features.copy_(features)
        recording.label.copy_(label)
        recording.replay()
        return recording.result

    def _make(self, shape: Hashable, features: Tensor, label: Tensor) -> None:
        """Record a step of this shape in the inputs' memory, or give up recording and tell why."""
        try:
            if len(self._recordings) == MOST_GRAPHS:
                raise RuntimeError(f"there are graphs of {MOST_GRAPHS} batch sizes already")
            result, replay = self._record(lambda: self._step(features, label))
            self._recordings[shape] = _Recording(features, label, result, replay)
        except RuntimeError as error:  # from an operation or the driver: not everything can be recorded
            self._given_up = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._on_message(
                f"Steps are not recorded as CUDA graphs from here on ({reason}); the result is the same, "
                "but small steps may be slower."
            )


@dataclass(frozen=True)
class _Recording:
    features: Tensor  # the inputs' memory
    label: Tensor
    result: StepResult
    replay: Callable[[], None]
