"""What the routes call: the retriever that answers now, and the threads that work for it.

Work is done in a few fixed threads, so that FAISS and torch do not hold up the event loop and keep one
OpenMP pool each.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import orjson
import torch

from serve.batching import Batcher
from serve.log import log_event
from serve.metrics import Metrics
from serve.probe import Probe
from twotower.errors import RequestError
from twotower.retrieval.front import Front
from twotower.retrieval.query import Answer, Query
from twotower.retrieval.retriever import Retriever

T = TypeVar("T")
F = TypeVar("F", bound=Front)


class Service(ABC, Generic[F]):
    """Answers as JSON from the generation that is there now."""

    def __init__(
        self,
        front: F,
        max_k: int,
        workers: int,
        settings: dict[str, dict[str, str]],
        threads: int = 1,
        metrics: Metrics | None = None,
    ) -> None:
        """Start the threads.

        Args:
            front: of what answers; has answered a query already, so that the first real one finds all loaded.
            max_k: largest k of a request.
            workers: requests worked on at the same time.
            settings: what ``/readyz`` says about Ray's settings: those active and those missing.
            threads: CPU threads of the query tower.
            metrics: counts and measures; nothing when not given.
        """
        self.metrics = metrics or Metrics()
        self._front: F | None = None
        self.front = front
        self.max_k = max_k
        self.settings = settings
        self._pool = ThreadPoolExecutor(
            workers, "retrieve", initializer=functools.partial(torch.set_num_threads, threads)
        )
        self.ready = True

    @property
    def front(self) -> F:
        """Of what answers; may be replaced at any time, so that a request reads it once."""
        assert self._front is not None
        return self._front

    @front.setter
    def front(self, front: F) -> None:
        before, self._front = self._front, front
        self.metrics.serves(front.generation.manifest)
        new = front.generation_id
        if before is None:
            log_event("started", f"generation {new} answers", generation=new)
        else:
            old = before.generation_id
            log_event("generation_switched", f"{new} answers, not {old}", generation=new, previous=old)

    def refused(self, generation_id: str, reason: str) -> None:
        """Count and log that a generation was published and is not served."""
        self.metrics.refused()
        log_event(
            "generation_refused",
            f"{generation_id} is not served: {reason}",
            logging.ERROR,
            generation=generation_id,
            reason=reason,
        )

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what ``work`` returns, run in one of the threads."""
        asked = time.perf_counter()

        def timed() -> T:
            self.metrics.waited((time.perf_counter() - asked) * 1e3)
            return work(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._pool, timed)

    def close(self) -> None:
        """Stop the threads; requests have ended before."""
        self.ready = False
        self._pool.shutdown(wait=False, cancel_futures=True)
        log_event("stopped", "no request is left", generation=self.front.generation_id)
        self.metrics.close()

    def noted(self, answer: Answer) -> bytes:
        """Return an answer as JSON, after counting it."""
        self.metrics.answer(answer)
        return to_json(answer)

    @abstractmethod
    async def retrieve(self, query: Query) -> bytes:
        """Return the answer to a query as JSON.

        Raises:
            RequestError: the query asks for something that is not allowed.
        """

    @abstractmethod
    async def similar(
        self, item_id: str, k: int, fields: Sequence[str], predicates: dict[str, Any] | None
    ) -> bytes:
        """Return the items most similar to an item, of those that satisfy predicates, as JSON.

        Raises:
            RequestError: there is no such item, or something that is not allowed is asked for.
        """

    def describe(self) -> dict[str, Any]:
        """Return the facts of the generation that answers now, as plain JSON values."""
        return self.front.describe()


class FusedService(Service[Retriever]):
    """Answers from a retriever in this process: the query tower and all shards."""

    def __init__(
        self,
        front: Retriever,
        max_k: int,
        workers: int,
        settings: dict[str, dict[str, str]],
        threads: int = 1,
        metrics: Metrics | None = None,
        probe_every: int = 0,
        batch_window_ms: float | None = None,
    ) -> None:
        """Start the threads.

        Args:
            front: answers; has answered a query already.
            max_k: as of ``Service``.
            workers: as of ``Service``.
            settings: as of ``Service``.
            threads: as of ``Service``.
            metrics: as of ``Service``.
            probe_every: compare one of so many answers with exact search, aside; 0 compares none.
            batch_window_ms: milliseconds for which a query waits for others to be answered together; when
                not given 1 with a GPU, which takes a batch in the time of one query, and 0 without.
        """
        super().__init__(front, max_k, workers, settings, threads, metrics)
        self._probe = Probe(probe_every, self.metrics.probed)
        window_ms = (1.0 if front.on_gpu else 0.0) if batch_window_ms is None else batch_window_ms
        self._batcher = Batcher(self._answer_batch, window_ms) if window_ms else None

    def close(self) -> None:
        """Stop the threads, as in ``Service``."""
        self._probe.close()
        super().close()

    async def retrieve(self, query: Query) -> bytes:
        """Return the answer to a query as JSON, as in ``Service``."""
        if self._batcher is not None:
            return await self._batcher.answer(query)
        retriever = self.front
        return await self.run(lambda: self._probed(retriever, query, retriever.retrieve(query)))

    async def similar(
        self, item_id: str, k: int, fields: Sequence[str], predicates: dict[str, Any] | None
    ) -> bytes:
        """Return the items most similar to an item as JSON, as in ``Service``."""
        retriever = self.front
        return await self.run(lambda: self.noted(retriever.similar(item_id, k, fields, predicates)))

    def _probed(self, retriever: Retriever, query: Query, answer: Answer) -> bytes:
        self._probe.offer(retriever, query, answer)
        return self.noted(answer)

    async def _answer_batch(self, queries: Sequence[Query]) -> Sequence[bytes | Exception]:
        retriever = self.front

        def answer(some: Sequence[Query]) -> list[bytes | Exception]:
            try:
                answers = retriever.retrieve_batch(some)
            except RequestError as error:
                if len(some) == 1:
                    return [error]
                # The others are not to suffer for one that is refused.
                middle = len(some) // 2
                return answer(some[:middle]) + answer(some[middle:])
            return [self._probed(retriever, q, a) for q, a in zip(some, answers, strict=True)]

        return await self.run(answer, queries)


def to_json(answer: Answer) -> bytes:
    """Return an answer as the bytes of its JSON."""
    return orjson.dumps(
        {
            "generation": answer.generation,
            "items": answer.items,
            "strategy": answer.strategy,
            "partial": bool(answer.missing_groups),
            "missing_groups": answer.missing_groups,
            "timing_ms": answer.timing_ms,
        },
        # An item column may hold what JSON has no word for, such as a decimal.
        default=str,
    )
