"""Answers from this process: the query tower and all shards of the generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serve.admission import check_deadline
from serve.batching import Batcher
from serve.metrics import Metrics
from serve.probe import Probe
from serve.schemas import BadRequest
from serve.service import Service, name_the_wrong_one
from twotower.config import LimitsConfig
from twotower.errors import NotAllowedError, RequestError
from twotower.retrieval.query import Answer, Query
from twotower.retrieval.retriever import Retriever


class FusedService(Service[Retriever]):
    """Answers as JSON from a retriever in this process."""

    def __init__(
        self,
        front: Retriever,
        max_k: int,
        workers: int,
        settings: dict[str, dict[str, str]],
        threads: int = 1,
        limits: LimitsConfig | None = None,
        metrics: Metrics | None = None,
        probe_every: int = 0,
        batch_window_ms: float | None = None,
        inline_ms: float = 2.0,
    ) -> None:
        """Start the threads.

        Args:
            front: answers; has answered a query already.
            max_k: as of ``Service``.
            workers: as of ``Service``.
            settings: as of ``Service``.
            threads: as of ``Service``.
            limits: as of ``Service``.
            metrics: as of ``Service``.
            probe_every: compare one of so many answers with exact search, aside; 0 compares none.
            batch_window_ms: milliseconds for which a query waits for others to be answered together; when
                not given 1 with a GPU, which takes a batch in the time of one query, and 0 without.
            inline_ms: as of ``Service``.
        """
        super().__init__(front, max_k, workers, settings, threads, limits, metrics, inline_ms)
        self._probe = Probe(probe_every, Retriever.index_recall, self.metrics.probed)
        window_ms = (1.0 if front.on_gpu else 0.0) if batch_window_ms is None else batch_window_ms
        self._batcher = Batcher(self._answer_together, window_ms) if window_ms else None

    def close(self) -> None:
        """Stop the threads, as in ``Service``."""
        self._probe.close()
        super().close()

    async def retrieve(self, query: Query, deadline: float = math.inf) -> bytes:
        """Return the answer to a query as JSON, as in ``Service``."""
        if self._batcher is not None:
            return await self._batcher.answer((query, deadline))
        retriever = self.front
        run = self.runner(retriever, query)
        answer: bytes = await run(self._answer, retriever, query, deadline=deadline)
        return answer

    async def retrieve_batch(self, queries: Sequence[Query], deadline: float = math.inf) -> bytes:
        """Return the answers to queries as JSON, as in ``Service``."""
        retriever = self.front

        def answer() -> bytes:
            try:
                return self.noted_batch(retriever.retrieve_batch(queries))
            except NotAllowedError:
                name_the_wrong_one(retriever, queries)
                raise

        return await self.workers.run(answer, deadline=deadline)

    async def similar(
        self,
        item_id: str,
        k: int,
        fields: Sequence[str],
        predicates: dict[str, Any] | None,
        deadline: float = math.inf,
    ) -> bytes:
        """Return the items most similar to an item as JSON, as in ``Service``."""
        retriever = self.front
        run = self.runner(retriever, Query(k=k, fields=fields, filter=predicates))
        answer: bytes = await run(
            lambda: self.noted(retriever.similar(item_id, k, fields, predicates)), deadline=deadline
        )
        return answer

    def _answer(self, retriever: Retriever, query: Query) -> bytes:
        return self._probed(retriever, query, retriever.retrieve(query))

    def _probed(self, retriever: Retriever, query: Query, answer: Answer) -> bytes:
        self._probe.offer(retriever, query, answer)
        return self.noted(answer)

    async def _answer_together(self, asked: Sequence[tuple[Query, float]]) -> Sequence[bytes | Exception]:
        """Return for each query, with its deadline, its answer, or why it has none."""
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

        def begin() -> list[bytes | Exception]:
            late = [_passed(deadline) for _, deadline in asked]
            rest = [query for (query, _), error in zip(asked, late, strict=True) if error is None]
            answers = iter(answer(rest) if rest else ())
            return [next(answers) if error is None else error for error in late]

        return await self.workers.run(begin)


def _passed(deadline: float) -> BadRequest | None:
    """Return the answer to a request whose deadline has passed; None where it has not."""
    try:
        check_deadline(deadline)
    except BadRequest as error:
        return error
    return None
