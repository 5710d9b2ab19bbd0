"""Index recall on live traffic: some of the answers given are compared with exact search, aside.

A probe never holds up a request: a full queue drops it, and its thread has the lowest priority and rests
after each search for as long as keeps its share of a core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from serve.log import log_event
from twotower.retrieval.query import Answer, Query

F = TypeVar("F")

_LATEST = 100
_MOST_WAITING = 8
_LOWEST_PRIORITY = 19


def lowest_priority() -> None:
    """Give this thread the lowest priority; on Linux a priority is that of a thread."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


class Probe(Generic[F]):
    """Compares every Nth answer with exact search of the same generation."""

    def __init__(
        self,
        every: int,
        index_recall: Callable[[F, Query, Sequence[str]], float | None],
        report: Callable[[float], None],
        share: float = 0.05,
        latest: int = _LATEST,
    ) -> None:
        """Start the thread.

        Args:
            every: N; of so many answers one is compared. 0 compares none.
            index_recall: returns the share of the best items that an answer holds, given what answered, the
                query and the ids; None where there is none. It is called in the thread.
            report: takes the mean index recall of the latest probes after each.
            share: of the time that probes may take, in (0, 1].
            latest: number of probes that the mean is over.
        """
        self._every = every
        self._index_recall = index_recall
        self._report = report
        self._share = share
        self._counter = itertools.count(1)
        self._waiting: queue.Queue[Any] = queue.Queue(_MOST_WAITING)
        self._recalls: deque[float] = deque(maxlen=latest)
        self._end = threading.Event()
        if every:
            threading.Thread(target=self._work, name="probe", daemon=True).start()

    def offer(self, front: F, query: Query, answer: Answer) -> None:
        """Look at an answer later, if it is its turn; takes no time."""
        if not self._every or next(self._counter) % self._every or answer.strategy == "popular":
            return
        # What happens after this moment was not known to the answer.
        asked = query if query.at is not None else dataclasses.replace(query, at=time.time_ns() // 1000)
        # A weak reference: a generation that was replaced is freed, probe or not.
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((weakref.ref(front), asked, [i["item_id"] for i in answer.items]))

    def close(self) -> None:
        """End the thread after the probe that it is at."""
        self._end.set()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)

    def _work(self) -> None:
        lowest_priority()
        while (waiting := self._waiting.get()) is not None and not self._end.is_set():
            start = time.perf_counter()
            try:
                self._look(*waiting)
            except Exception as error:
                log_event(
                    "probe_failed",
                    "an answer could not be probed",
                    logging.WARNING,
                    error=type(error).__name__,
                )
            del waiting
            self._end.wait((time.perf_counter() - start) * (1 / self._share - 1))

    def _look(self, reference: Callable[[], F | None], query: Query, item_ids: list[str]) -> None:
        front = reference()
        found = None if front is None else self._index_recall(front, query, item_ids)
        if found is not None:
            self._recalls.append(found)
            self._report(sum(self._recalls) / len(self._recalls))
