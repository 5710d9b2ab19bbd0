"""Answers queries that come at about the same time together, which a GPU does in the time of one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_BATCH = 64
"""Queries of a batch; the next ones begin another."""


class Batcher(Generic[T]):
    """Collects queries of one event loop for a moment, then has them answered in one call."""

    def __init__(
        self,
        work: Callable[[Sequence[T]], Awaitable[Sequence[bytes | Exception]]],
        window_ms: float,
        max_batch: int = MAX_BATCH,
    ) -> None:
        """Take what answers.

        Args:
            work: returns for each query its answer, or why it has none.
            window_ms: milliseconds for which the first query of a batch waits for others.
            max_batch: number of queries that do not wait any longer.
        """
        self._work = work
        self._window_s = window_ms / 1e3
        self._max_batch = max_batch
        self._batch: list[tuple[T, asyncio.Future[bytes]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def answer(self, query: T) -> bytes:
        """Return the answer to a query; raises what ``work`` returned instead of one."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bytes] = loop.create_future()
        self._batch.append((query, future))
        if len(self._batch) >= self._max_batch:
            self._begin()
        elif self._timer is None:
            self._timer = loop.call_later(self._window_s, self._begin)
        return await future

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Whoever has gone away meanwhile costs nothing.
        batch = [(query, future) for query, future in self._batch if not future.done()]
        self._batch = []
        if batch:
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: list[tuple[T, asyncio.Future[bytes]]]) -> None:
        answers: Sequence[bytes | Exception]
        try:
            answers = await self._work([query for query, _ in batch])
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
