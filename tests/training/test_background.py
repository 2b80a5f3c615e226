"""A thread that runs ahead: the same items, the same exceptions, and no thread left behind."""

from __future__ import annotations

import threading

import pytest

from cocoop_fast.training.background import in_background


def looking_ahead():
    return [thread for thread in threading.enumerate() if "look-ahead" in thread.name]


def numbers(n, closed=None, fault=None):
    try:
        yield from range(n)
        if fault is not None:
            raise fault
    finally:
        if closed is not None:
            closed.append(True)


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_the_same_items(ahead):
    assert list(in_background(numbers(20), ahead)) == list(range(20))
    assert not looking_ahead()


@pytest.mark.parametrize("fault", [ValueError("here"), KeyboardInterrupt()])
def test_an_exception_comes_in_its_place(fault):
    items, seen = in_background(numbers(5, fault=fault), 2), []
    with pytest.raises(type(fault)):
        for item in items:
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4] and not looking_ahead()


@pytest.mark.parametrize("taken", [1, 7])
def test_closed_early(taken):
    closed = []
    items = in_background(numbers(1000, closed), 2)
    assert [next(items) for _ in range(taken)] == list(range(taken))
    items.close()
    assert closed == [True] and not looking_ahead()
