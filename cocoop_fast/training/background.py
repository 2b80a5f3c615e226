"""An iterator that a thread runs ahead of its consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def in_background(items: Generator[Item, None, None], ahead: int) -> Generator[Item, None, None]:
    """The same items in the same order, made by a thread that is up to ``ahead`` of them in front.

    An exception of ``items`` is raised where its item would have come. The thread ends, and ``items`` is closed, with
    this generator, also when it is closed early.
    """
    end = object()
    with ThreadPoolExecutor(1, "look-ahead") as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(ahead))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]  # it is not `end`
        finally:
            thread.shutdown(cancel_futures=True)
            items.close()
