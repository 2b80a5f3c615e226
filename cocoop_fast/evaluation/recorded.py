"""The logits of one batch after another as long as a process lives, replayed from CUDA graphs where a batch size comes often."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from cocoop_fast.engine.graphs import Record, Recorded
from cocoop_fast.evaluation.evaluate import WORTH_RECORDING
from cocoop_fast.methods.base import LearnedPromptCLIP

R = TypeVar("R")


class RecordedLogits:
    """A model's logits, for callers in any number of threads: of them, one at a time.

    A batch size is recorded when it has come as often as makes an evaluation worth recording. Where the model is changed in a
    way that a graph would not notice (other classes, weights, dtype or device), the graphs made of it go.

    Args:
        model: in evaluation mode.
        record: how work is recorded.
        on_message: told why batches are not recorded, if they cannot be.
    """

    def __init__(
        self, model: LearnedPromptCLIP, record: Record, on_message: Callable[[str], None] = lambda line: None
    ) -> None:
        self._model, self._record, self._on_message = model, record, on_message
        self._recorded: Recorded[Tensor] | None = None
        self._made_of: tuple[object, ...] = ()
        self._lock = Lock()

    def __call__(self, image_features: Tensor, read: Callable[[Tensor], R]) -> R:
        """What is read of the logits (B, K) of image features (B, E), whose memory the next call may write into.

        Raises:
            UserError: features of the wrong width or not finite.
        """
        with self._lock:
            self._model.check(image_features)  # a replay looks at no values
            kind = image_features.device.type
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            made_of = (*autocast, *self._model.made_of())
            if self._recorded is None or made_of != self._made_of:
                self._recorded, self._made_of = self._new(), made_of
            return read(self._recorded(image_features))

    def release(self) -> bool:
        """Let go of the graphs and their memory, and record nothing from now on. Returns whether there were any."""
        with self._lock:
            return self._recorded is not None and self._recorded.release()

    def _new(self) -> Recorded[Tensor]:
        model = self._model
        why_not = partial(model.why_not_recorded, training=False)
        name = "batches of a prediction"
        tell, record = self._on_message, self._record
        return Recorded(model.forward_features, tell, record, why_not, name, after=WORTH_RECORDING)

    def __reduce__(self) -> tuple[object, ...]:
        """For copies and pickles, whose graphs are their own; what is told of them is for nobody."""
        return RecordedLogits, (self._model, self._record)
