"""Batches made by a thread while a GPU does the steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def made_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield items that a thread makes up to ``depth`` ahead; its error is raised here."""
    made: queue.Queue[T | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(value: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return made.put(value, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # raised where the items are used
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
