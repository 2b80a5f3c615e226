"""An iterator that a thread runs ahead of its consumer."""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import Empty, Full, Queue
from typing import TypeVar

Item = TypeVar("Item")

_PATIENCE = 0.1  # seconds between looks at whether the consumer has gone


def in_background(items: Generator[Item, None, None], ahead: int) -> Generator[Item, None, None]:
    """The same items in the same order, made by a thread that is up to ``ahead`` of them in front.

    An exception of ``items`` is raised where its item would have come. The thread ends, and closes ``items``, with this
    generator, also when it is closed early.
    """
    queue: Queue[tuple[Item] | BaseException | None] = Queue(ahead)
    gone = threading.Event()

    def hand_over(one: tuple[Item] | BaseException | None) -> None:
        while not gone.is_set():
            try:
                queue.put(one, timeout=_PATIENCE)
                return
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                hand_over((item,))
                if gone.is_set():
                    return
            hand_over(None)
        except BaseException as error:
            hand_over(error)
        finally:
            items.close()

    thread = threading.Thread(target=work, name="look-ahead", daemon=True)
    thread.start()
    try:
        while (one := queue.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one[0]
    finally:
        gone.set()
        while True:  # room for the item that the thread may be waiting to hand over
            try:
                queue.get_nowait()
            except Empty:
                break
        thread.join()
