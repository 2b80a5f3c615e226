"""Work recorded as a CUDA graph: hundreds of small launches become one.

The class tree is fixed, so the shapes of a training step, or of an evaluated batch, depend on the batch size alone, and with few
classes its kernels run shorter than their launches take. The optimizer stays outside of the graph: it is one fused kernel, and
outside its learning rate may change and its loss scaler may skip it without recording anew.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, cuda

from cocoop_fast.engine.memory import PassMemory, lent_for_good

# Calls of a shape that are done without a graph first: they compile kernels and let libraries allocate
# their workspaces, neither of which can be recorded.
WARM_UP_STEPS = 3

# Each graph holds the activations of its batch size. A run has one size, and a second where the last batch is smaller.
MOST_GRAPHS = 4

Record: TypeAlias = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
R = TypeVar("R")

# Of streams: the image encoder's is 0, so that a step goes before the features of the steps to come.
_BEFORE_THE_ENCODER = -1


class CudaGraphs:
    """Records launches as CUDA graphs.

    The stream that records is one of the device's own: torch's default belongs to the GPU that recorded first in this
    process, and on another GPU it would record nothing. Whatever happens while recording, it ends, and the caller's stream is
    the current one again.

    Args:
        device: where the work is launched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, work: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        """Record the launches of ``work``, without running them.

        The passes of ``work`` get the memory that passes before it used, and keep it.

        Returns:
            Its result, whose memory has no content yet, and a function that fills it by running the launches again
            with what the inputs' memory then holds.

        Raises:
            RuntimeError: a launch cannot be recorded, or memory does not suffice.
        """
        graph, pool = cuda.CUDAGraph(), cuda.graph_pool_handle()
        with cuda.device(self._device), lent_for_good() as memory:
            gc.collect()
            cuda.synchronize(self._device)
            cuda.empty_cache()  # the graph allocates apart from what is cached
            stream = cuda.Stream(self._device, priority=_BEFORE_THE_ENCODER)
            stream.wait_stream(cuda.current_stream(self._device))
            with cuda.stream(stream):  # unlike torch.cuda.graph it restores the stream where ending fails
                # "thread_local": a data loader may pin memory in another thread meanwhile, no business of the graph.
                try:
                    graph.capture_begin(pool, capture_error_mode="thread_local")
                    result = work()
                except BaseException:
                    with suppress(RuntimeError):  # what could not be recorded has broken the recording
                        _end(graph, pool)
                    raise
                _end(graph, pool)
        return result, _Replay(graph, memory)


# The second is its name in older versions of torch.
_end_allocating: Any = getattr(torch._C, "_cuda_endAllocateToPool", None) or getattr(
    torch._C, "_cuda_endAllocateCurrentStreamToPool", None
)


def _end(graph: cuda.CUDAGraph, pool: Any) -> None:
    """End a recording, in a pool of memory of its own."""
    try:
        graph.capture_end()
    except RuntimeError:
        _mend(graph, pool)
        raise


_broken: list[cuda.CUDAGraph] = []  # whom torch may still ask whether pinned memory is theirs


def _mend(graph: cuda.CUDAGraph, pool: Any) -> None:
    """Put right what a recording that was broken leaves of torch.

    Its `capture_end` raises before it is through: the allocator would go on as if something were recorded, and take back no
    memory that another stream has used; and the generator would refuse random numbers until some recording ends well.
    """
    with suppress(RuntimeError):  # of a torch that has done it
        _end_allocating(cuda.current_device(), pool)
        torch._C._cuda_releasePool(cuda.current_device(), pool)
    _broken.append(graph)
    with suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is empty
        whole = cuda.CUDAGraph()
        whole.capture_begin(capture_error_mode="thread_local")
        whole.capture_end()


@dataclass(frozen=True)
class _Replay:
    """Runs a graph, and holds the memory that it writes into."""

    graph: cuda.CUDAGraph
    memory: list[PassMemory]

    def __call__(self) -> None:
        self.graph.replay()


class Recorded(Generic[R]):
    """A function of tensors that records another one, once for each shape of its inputs, and replays it.

    What it returns is overwritten by the next call of the same shape. Weights of the model may not be replaced
    between calls; the parameters it learns are read anew by each.

    Args:
        work: without data-dependent shapes. What cannot be recorded is done as it is.
        on_message: told, once, why it is not recorded.
        record: how work is recorded.
        why_not: asked before recording: why the work waits for the device and so cannot be recorded, or ``None``.
        name: what a call is to a user, in the plural.
        after: calls of a shape before it is recorded; the first ones warm up.
    """

    def __init__(
        self,
        work: Callable[..., R],
        on_message: Callable[[str], None],
        record: Record,
        why_not: Callable[[], str | None] = lambda: None,
        name: str = "steps",
        after: int = WARM_UP_STEPS,
    ) -> None:
        self._work = work
        self._on_message = on_message
        self._record = record
        self._why_not = why_not
        self._name = name
        self._after = after
        self._recordings: dict[Hashable, _Recording[R]] = {}
        self._seen: Counter[Hashable] = Counter()
        self._given_up = False

    def __call__(self, *inputs: Tensor) -> R:
        shape = tuple((one.shape, one.dtype) for one in inputs)
        self._seen[shape] += 1
        if self._seen[shape] > self._after and not self._given_up and shape not in self._recordings:
            self._make(shape, inputs)
        recording = self._recordings.get(shape)
        if recording is None:
            return self._work(*inputs)
        for memory, value in zip(recording.inputs, inputs, strict=True):
            memory.copy_(value)
        recording.replay()
        return recording.result

    def release(self) -> bool:
        """Let go of the graphs and their memory; nothing is recorded from now on. For want of memory.

        Returns:
            Whether there were any.
        """
        found, self._given_up = bool(self._recordings), True
        self._recordings.clear()
        return found

    def _make(self, shape: Hashable, inputs: tuple[Tensor, ...]) -> None:
        """Record a call of this shape, or give up recording and tell why."""
        reason = self._why_not()
        if reason is None and len(self._recordings) == MOST_GRAPHS:
            reason = f"there are graphs of {MOST_GRAPHS} batch sizes already"
        if reason is None:
            reason = self._try(shape, inputs)
        if reason is not None:
            self._given_up = True
            self._on_message(
                f"{self._name.capitalize()} are not recorded as CUDA graphs from here on ({reason}); the result is the "
                f"same, but small {self._name} may be slower."
            )

    def _try(self, shape: Hashable, inputs: tuple[Tensor, ...]) -> str | None:
        """Why not, if not. Nothing refers to what a failed recording allocated when this is over."""
        try:
            own = tuple(one.clone() for one in inputs)  # the inputs' memory
            result, replay = self._record(lambda: self._work(*own))
        except RuntimeError as error:
            # From an operation, the driver or the allocator: not everything can be recorded.
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        self._recordings[shape] = _Recording(own, result, replay)
        return None


@dataclass(frozen=True)
class _Recording(Generic[R]):
    inputs: tuple[Tensor, ...]  # their memory
    result: R
    replay: Callable[[], None]
