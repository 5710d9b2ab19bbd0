"""What the routes call: the retriever that answers now, and the threads that work for it.

Work is done in a few fixed threads, so that FAISS and torch do not hold up the event loop and keep one
OpenMP pool each.
"""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
import torch

from twotower.retrieval.follower import Follower
from twotower.retrieval.front import Front
from twotower.retrieval.query import Answer, Query
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
    ) -> None:
        """Start the threads.

        Args:
            front: of what answers; has answered a query already, so that the first real one finds all loaded.
            max_k: largest k of a request.
            workers: requests worked on at the same time.
            settings: what ``/readyz`` says about Ray's settings: those active and those missing.
            threads: CPU threads of the query tower.
        """
        self.front = front
        """Of what answers; may be replaced at any time, so that a request reads it once."""
        self.max_k = max_k
        self.settings = settings
        self._pool = ThreadPoolExecutor(
            workers, "retrieve", initializer=functools.partial(torch.set_num_threads, threads)
        )
        self._follower: Follower[Any] | None = None
        self.ready = True

    def follow(self, follower: Follower[Any]) -> None:
        """Let what a follower loads answer from now on."""

        def use(front: Front) -> None:
            # One assignment switches query tower, shards, user table and item table together.
            self.front = front

        self._follower = follower
        follower.start(use)

    def status(self) -> dict[str, Any]:
        """Return which generations are in memory, and which one was refused and why, as plain JSON values."""
        follower = self._follower
        if follower is None:
            return {"held": [self.front.generation_id], "refused": None, "pointer_problem": None}
        refused = follower.refused
        return {
            "held": follower.held,
            "refused": None if refused is None else {"id": refused.id, "reason": refused.reason},
            "pointer_problem": follower.problem,
        }

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what ``work`` returns, run in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, functools.partial(work, *arguments)
        )

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
        """Return the facts of the generation that answers now, and ``status``, as plain JSON values."""
        return {**self.front.describe(), **self.status()}


class FusedService(Service):
    """Answers from a retriever in this process: the query tower and all shards."""

    front: Retriever

    async def retrieve(self, query: Query) -> bytes:
        """Return the answer to a query as JSON, as in ``Service``."""
        retriever = self.front
        return await self.run(lambda: to_json(retriever.retrieve(query)))

    async def similar(
        self, item_id: str, k: int, fields: Sequence[str], predicates: dict[str, Any] | None
    ) -> bytes:
        """Return the items most similar to an item as JSON, as in ``Service``."""
        retriever = self.front
        return await self.run(lambda: to_json(retriever.similar(item_id, k, fields, predicates)))


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
