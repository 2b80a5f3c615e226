"""What another thread writes into an array while an operation of the extension runs changes no row that it works on."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from cocoop_fast.ops.extensions import CPP


@contextmanager
def alternating(array: np.ndarray, *values: int) -> Iterator[None]:
    """Another thread fills the array with each of the values in turn."""
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for value in values:
                array.fill(value)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()


def test_rows_are_chosen_before_they_are_read(isa):
    x = np.arange(2, dtype=np.float32)[None, :, None].repeat(20_000, 0).repeat(16, 2)
    out, index = np.empty((20_000, 1, 16), np.float32), np.zeros(1, np.int64)
    with alternating(index, 0, 1):
        for _ in range(20):
            CPP.load().gather_rows(x, index, out)
            assert len(np.unique(out)) == 1
    to = np.zeros_like(x)
    with alternating(index, 0, 1):
        for _ in range(20):
            to[:] = 0
            CPP.load().add_rows(np.ones_like(out), index, to)
            assert len(np.unique(to[:, 0])) == 1


def test_labels_are_checked_and_used_as_they_are_at_the_call(isa):
    logits, labels = (
        np.zeros((400, 2000), np.float32),
        np.zeros(400, np.int64),
    )  # few enough to be filled at once
    logits[:, 1] = 1
    losses = [math.log(1999 + math.e) - label for label in (0, 1)]
    d_logits = np.empty_like(logits)
    with alternating(labels, 0, 1):
        for _ in range(10):
            loss = CPP.load().cross_entropy_fwd(logits, labels)
            assert min(abs(loss - one) for one in losses) < 1e-5
            CPP.load().cross_entropy_bwd(logits, labels, 1.0, d_logits)
            assert len(np.unique(d_logits[:, 1])) == 1


def test_odd_addresses(widest_isa):
    """Of numbers they are refused, as the kernels load whole ones; integers are copied."""
    extension = CPP.load()

    def odd(count: int, dtype: type) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        return np.zeros(count * size + 1, np.int8)[1:].view(dtype)

    x, out = np.arange(6, dtype=np.float32).reshape(1, 3, 2), np.empty((1, 2, 2), np.float32)
    index = odd(2, np.int64)
    index[:] = 2, 0
    extension.gather_rows(x, index, out)
    assert out.tolist() == [[[4, 5], [0, 1]]]
    parent = odd(3, np.int64)
    parent[:] = -1, 0, 1
    assert extension.AttentionPlan(1, parent, index[1:]).n_queries == 1
    with pytest.raises(ValueError, match="`logits` must be aligned, got an odd address"):
        extension.cross_entropy_fwd(odd(2, np.float32).reshape(1, 2), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="`gamma` must be aligned, got an odd address"):
        extension.layer_norm_fwd(x[0], None, None, odd(2, np.float32), np.zeros(2, np.float32), 1e-5, x[0].copy(), np.empty(3, np.float32), np.empty(3, np.float32))  # fmt: skip


@pytest.mark.parametrize("sizes", [(2**62, 1, 1), (1, 2**62, 1), (1, 1, 2**62), (2**31, 2**31, 2**31)])
def test_sizes_beyond_64_bits(widest_isa, sizes):
    plan = CPP.load().AttentionPlan(2, np.array([-1, 0]))
    with pytest.raises(ValueError, match="must be sizes of arrays, got more numbers than memory can have"):
        plan.workspace_floats(*sizes)
