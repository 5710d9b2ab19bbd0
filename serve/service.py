"""What the routes call: the generation that answers now, and what does the work."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import orjson

from serve.admission import Admission
from serve.log import log_event
from serve.metrics import Metrics
from serve.workers import Workers
from twotower.config import LimitsConfig
from twotower.errors import NotAllowedError
from twotower.retrieval.follower import Follower
from twotower.retrieval.front import Front
from twotower.retrieval.query import Answer, Query
from twotower.retrieval.request import InvalidQueryError

F = TypeVar("F", bound=Front)


class Service(ABC, Generic[F]):
    """Answers as JSON from the generation that is there now."""

    def __init__(
        self,
        front: F | None,
        max_k: int,
        workers: int,
        settings: dict[str, dict[str, str]],
        threads: int = 1,
        limits: LimitsConfig | None = None,
        metrics: Metrics | None = None,
        inline_ms: float = 2.0,
    ) -> None:
        """Start the threads.

        Args:
            front: of what answers; has answered a query already, so that the first real one finds all loaded.
                None: ``front`` is set before the first request.
            max_k: largest k of a request.
            workers: requests worked on at the same time.
            settings: what ``/readyz`` says about Ray's settings: those active and those missing.
            threads: CPU threads of the query tower.
            limits: of requests and of what waits; those of the configuration when not given.
            metrics: counts and measures; nothing when not given.
            inline_ms: milliseconds of the longest usual query that the event loop answers itself.
        """
        self.metrics = metrics or Metrics()
        self._front: F | None = None
        if front is not None:
            self.front = front
        self.max_k = max_k
        self.settings = settings
        self.limits = limits or LimitsConfig()
        self.admission = Admission(workers + self.limits.max_queued)
        self.workers = Workers(workers, threads, self.metrics.waited)
        self._inline_ms = inline_ms
        self._follower: Follower[F] | None = None
        self.ready = True

    @property
    def generation_id(self) -> str | None:
        """Id of the generation that answers; None before the first does."""
        return None if self._front is None else self._front.generation_id

    @property
    def front(self) -> F:
        """Of what answers; may be replaced at any time, so that a request reads it once."""
        assert self._front is not None
        return self._front

    @front.setter
    def front(self, front: F) -> None:
        # One assignment switches query tower, shards, user table and item table together.
        before, self._front = self._front, front
        self.metrics.serves(front.generation.manifest)
        new = front.generation_id
        if before is None:
            log_event("started", f"generation {new} answers", generation=new)
        else:
            old = before.generation_id
            log_event("generation_switched", f"{new} answers, not {old}", generation=new, previous=old)

    def follow(self, follower: Follower[F]) -> None:
        """Let what a follower loads answer from now on."""

        def use(front: F) -> None:
            self.front = front

        self._follower = follower
        follower.start(use, self.refused)

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

    def runner(self, front: F, query: Query) -> Callable[..., Any]:
        """Return what does the work on a query: ``workers.run_short`` where it takes little, or ``run``."""
        short = self._is_short(front) and front.usual(query)
        return self.workers.run_short if short else self.workers.run

    def _is_short(self, front: F) -> bool:
        """Return whether the event loop answers usual queries itself."""
        return front.usual_ms <= self._inline_ms

    def close(self) -> None:
        """Stop the threads; requests have ended before."""
        self.ready = False
        if self._follower is not None:
            # A change that is going on may itself wait for this thread.
            self._follower.close(wait=False)
        self.workers.close()
        log_event("stopped", "no request is left", generation=self.generation_id)
        self.metrics.close()

    def noted(self, answer: Answer) -> bytes:
        """Return an answer as JSON, after counting it."""
        self.metrics.answer(answer)
        return to_json(answer)

    def noted_batch(self, answers: Sequence[Answer]) -> bytes:
        """Return answers as the JSON of a batch, after counting them."""
        return b'{"answers":[' + b",".join(map(self.noted, answers)) + b"]}"

    @abstractmethod
    async def retrieve(self, query: Query, deadline: float = math.inf) -> bytes:
        """Return the answer to a query as JSON.

        Raises:
            RequestError: the query asks for something that is not allowed.
            BadRequest: the deadline, a reading of ``time.monotonic``, passed before it could be answered.
        """

    @abstractmethod
    async def retrieve_batch(self, queries: Sequence[Query], deadline: float = math.inf) -> bytes:
        """Return the answers to queries, in their order, as the JSON of a batch.

        Raises:
            NotAllowedError: a query asks for something that is not allowed; its place is named.
            BadRequest: the deadline passed before it could be answered.
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
            BadRequest: the deadline passed before it could be answered.
        """

    def status(self) -> dict[str, Any]:
        """Return which generations are in memory, what was refused and why, and where queries are answered.

        All are plain JSON values.
        """
        front, follower = self.front, self._follower
        work = {"usual_ms": round(front.usual_ms, 3), "inline": self._is_short(front)}
        if follower is None:
            return {"held": [front.generation_id], "refused": None, "pointer_problem": None, **work}
        refused = follower.refused
        return {
            "held": follower.held,
            "refused": None if refused is None else {"id": refused.id, "reason": refused.reason},
            "pointer_problem": follower.problem,
            **work,
        }

    def describe(self) -> dict[str, Any]:
        """Return the facts of the generation that answers now, and ``status``, as plain JSON values."""
        return {**self.front.describe(), **self.status()}


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


def to_json(answer: Answer) -> bytes:
    """Return an answer as the bytes of its JSON."""
    return orjson.dumps(
        {
            "generation": answer.generation,
            "items": answer.items,
            "strategy": answer.strategy,
            "history": answer.history,
            "partial": bool(answer.missing_groups),
            "missing_groups": answer.missing_groups,
            "timing_ms": answer.timing_ms,
        },
        # An item column may hold what JSON has no word for, such as a decimal.
        default=str,
    )
