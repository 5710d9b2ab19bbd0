"""Batches made by a thread while a GPU does the steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def made_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield items that a thread makes ``depth`` ahead of their use; its error is raised here.

    How many are made depends on how many are taken alone: where making one is a collective, all ranks that
    stop after the same item have made the same ones.
    """
    made: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def work() -> None:
        try:
            while asked.get():
                made.put(next(items, None))
        except BaseException as error:  # raised where the items are used
            made.put(error)

    for _ in range(depth):
        asked.put(True)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            asked.put(True)
            yield item
    finally:
        asked.put(False)
        thread.join()
