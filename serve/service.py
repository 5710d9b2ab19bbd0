"""What the routes call: the retriever that answers now, and the threads that work for it.

Work is done in a few fixed threads, so that FAISS and torch do not hold up the event loop and keep one
OpenMP pool each.
"""

from __future__ import annotations

import asyncio
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
import torch

from serve.admission import Admission, in_time
from twotower.config import LimitsConfig
from twotower.errors import NotAllowedError
from twotower.retrieval.front import Front
from twotower.retrieval.query import Answer, Query
from twotower.retrieval.request import InvalidQueryError
from twotower.retrieval.retriever import Retriever

T = TypeVar("T")


class Service(ABC):
    """Answers as JSON from the generation that is there now."""

    def __init__(
        self,
        front: Front,
        max_k: int,
        workers: int,
        settings: dict[str, dict[str, str]],
        threads: int = 1,
        limits: LimitsConfig | None = None,
    ) -> None:
        """Start the threads.

        Args:
            front: of what answers; has answered a query already, so that the first real one finds all loaded.
            max_k: largest k of a request.
            workers: requests worked on at the same time.
            settings: what ``/readyz`` says about Ray's settings: those active and those missing.
            threads: CPU threads of the query tower.
            limits: of requests and of what waits; those of the configuration when not given.
        """
        self.front = front
        """Of what answers; may be replaced at any time, so that a request reads it once."""
        self.max_k = max_k
        self.settings = settings
        self.limits = limits or LimitsConfig()
        self.admission = Admission(workers + self.limits.max_queued)
        self._pool = ThreadPoolExecutor(
            workers, "retrieve", initializer=functools.partial(torch.set_num_threads, threads)
        )
        self.ready = True

    async def run(self, work: Callable[..., T], *arguments: Any, deadline: float = math.inf) -> T:
        """Return what ``work`` returns, run in one of the threads.

        Args:
            work: a function.
            arguments: its arguments.
            deadline: reading of ``time.monotonic`` from which on work does not begin.

        Raises:
            BadRequest: the deadline has passed (504).
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, in_time, functools.partial(work, *arguments), deadline
        )

    @abstractmethod
    async def retrieve(self, query: Query, deadline: float = math.inf) -> bytes:
        """Return the answer to a query as JSON.

        Raises:
            RequestError: the query asks for something that is not allowed.
            BadRequest: the deadline, a reading of ``time.monotonic``, passed before work began.
        """

    @abstractmethod
    async def retrieve_batch(self, queries: Sequence[Query], deadline: float = math.inf) -> bytes:
        """Return the answers to queries, in their order, as the JSON of a batch.

        Raises:
            NotAllowedError: a query asks for something that is not allowed; its place is named.
            BadRequest: the deadline passed before work began.
        """

    @abstractmethod
    async def similar(
        self,
        item_id: str,
        k: int,
        fields: Sequence[str],
        predicates: dict[str, Any] | None,
        deadline: float = math.inf,
    ) -> bytes:
        """Return the items most similar to an item, of those that satisfy predicates, as JSON.

        Raises:
            RequestError: there is no such item, or something that is not allowed is asked for.
            BadRequest: the deadline passed before work began.
        """

    def status(self) -> dict[str, Any]:
        """Return how the service is doing, for ``/readyz``."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return the facts of the generation that answers now, as plain JSON values."""
        return self.front.describe()


class FusedService(Service):
    """Answers from a retriever in this process: the query tower and all shards."""

    front: Retriever

    async def retrieve(self, query: Query, deadline: float = math.inf) -> bytes:
        """Return the answer to a query as JSON, as in ``Service``."""
        retriever = self.front
        return await self.run(lambda: to_json(retriever.retrieve(query)), deadline=deadline)

    async def retrieve_batch(self, queries: Sequence[Query], deadline: float = math.inf) -> bytes:
        """Return the answers to queries as JSON, as in ``Service``."""
        retriever = self.front

        def answer() -> bytes:
            try:
                return batch_to_json(retriever.retrieve_batch(queries))
            except NotAllowedError:
                name_the_wrong_one(retriever, queries)
                raise

        return await self.run(answer, deadline=deadline)

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
        return await self.run(
            lambda: to_json(retriever.similar(item_id, k, fields, predicates)), deadline=deadline
        )


def name_the_wrong_one(front: Front, queries: Sequence[Query]) -> None:
    """Raise the error of the first of several queries that is not allowed, with its place.

    Raises:
        InvalidQueryError: a query asks for something that is not allowed.
    """
    for place, query in enumerate(queries):
        try:
            if query.filter:
                front.generation.attributes.check(query.filter)
            front.encode([query])
        except NotAllowedError as error:
            detail = {"where": f"requests[{place}]", "message": error.message, "allowed": error.allowed}
            raise InvalidQueryError([detail]) from None


def batch_to_json(answers: Sequence[Answer]) -> bytes:
    """Return answers as the bytes of the JSON of a batch."""
    return b'{"answers":[' + b",".join(map(to_json, answers)) + b"]}"


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
