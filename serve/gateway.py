"""Answers from shard groups elsewhere: encodes here, asks every group, merges and describes here.

A group that does not answer in time is left out, and the answer says so. Every call names the generation
that encoded the queries, and a group answers from that generation or not at all.

Shapes: B queries, R of them that are searched.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from serve.admission import check_deadline, deadline_exceeded
from serve.fanout import describe_found, encode_for_groups, group_query
from serve.hedging import CutShortError, GroupUnavailableError, Replicas
from serve.metrics import Metrics
from serve.probe import Probe
from serve.service import Service, name_the_wrong_one
from twotower.config import LimitsConfig
from twotower.errors import NotAllowedError
from twotower.index.hits import Hits
from twotower.retrieval.canary import check_answers, check_vectors, sampled_rows
from twotower.retrieval.front import TIES, Front, timing
from twotower.retrieval.groups import (
    GroupQuery,
    merge_groups,
    pack_search,
    pack_vector_request,
    unpack_hits,
    unpack_vector,
)
from twotower.retrieval.query import Answer, Query

T = TypeVar("T")

_SHARE_OF_DEADLINE = 0.8
"""Of the time that a client waits, how much may go by until the groups have answered."""
_TRIES, _TRY_PAUSE_S = 4, 0.5
"""How often canary queries are asked where groups are late, and seconds in between."""
_PROBE_TIMEOUT_S = 30.0


class NoGroupError(TimeoutError):
    """No shard group answered, so that there is nothing to answer with."""


class GatewayService(Service[Front]):
    """Answers as JSON from a front here and shard groups elsewhere."""

    def __init__(
        self,
        front: Front | None,
        groups: Sequence[Replicas],
        max_k: int,
        workers: int,
        settings: dict[str, dict[str, str]],
        threads: int = 1,
        deadline_s: float = 0.2,
        limits: LimitsConfig | None = None,
        metrics: Metrics | None = None,
        inline_ms: float = 2.0,
        probe_every: int = 0,
    ) -> None:
        """Start the threads.

        Args:
            front: of the generation that the groups hold; as of ``Service``.
            groups: the shard groups, all of them.
            max_k: largest k of a request.
            workers: requests encoded or described at the same time.
            settings: what ``/readyz`` says about Ray's settings.
            threads: CPU threads of the query tower.
            deadline_s: seconds for each query of a message after which a group is left out.
            limits: of requests and of what waits.
            metrics: counts and measures; nothing when not given.
            inline_ms: as of ``Service``.
            probe_every: compare one of so many answers with exact search, aside; 0 compares none.
        """
        super().__init__(front, max_k, workers, settings, threads, limits, metrics, inline_ms)
        self.groups = groups
        self._deadline_s = deadline_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._probe = Probe(probe_every, self._index_recall, self.metrics.probed)

    def close(self) -> None:
        """Stop the threads, as in ``Service``."""
        self._probe.close()
        super().close()

    async def retrieve(self, query: Query, deadline: float = math.inf) -> bytes:
        """Return the answer to a query as JSON.

        Raises:
            RequestError: the query asks for something that is not allowed.
            NoGroupError: no group answered.
            BadRequest: the deadline passed before the groups were asked, or left them too little time.
        """
        front = self.front
        self._loop = asyncio.get_running_loop()

        def finish(answers: list[Answer]) -> bytes:
            (answer,) = answers
            if not answer.missing_groups:
                self._probe.offer(front, query, answer)
            return self.noted(answer)

        return await self._finished(front, [query], deadline, finish)

    async def retrieve_batch(self, queries: Sequence[Query], deadline: float = math.inf) -> bytes:
        """Return the answers to queries, in their order, as the JSON of a batch.

        Raises:
            NotAllowedError: a query asks for something that is not allowed; its place is named.
            NoGroupError: no group answered.
            BadRequest: as of ``retrieve``.
        """
        front = self.front
        try:
            return await self._finished(front, queries, deadline, self.noted_batch)
        except NotAllowedError:
            await self.workers.run(name_the_wrong_one, front, queries)
            raise

    async def answers(
        self, front: Front, queries: Sequence[Query], deadline: float = math.inf
    ) -> list[Answer]:
        """Return the best allowed items for each query; timings are those of the whole batch.

        Args:
            front: of a generation that the groups hold.
            queries: B queries.
            deadline: reading of ``time.monotonic`` from which on work does not begin and no group is asked.

        Raises:
            BadRequest: the deadline has passed, or left the groups too little time.
            RequestError: a query asks for something that is not allowed.
            NoGroupError: no group answered.
        """
        return await self._finished(front, queries, deadline, list)

    async def _finished(
        self, front: Front, queries: Sequence[Query], deadline: float, finish: Callable[[list[Answer]], T]
    ) -> T:
        """Return what ``finish`` makes of the answers to queries, where their items are described.

        JSON of thousands of items takes tens of milliseconds: in the event loop it would hold up messages,
        beats and hedges.
        """
        run = self.runner(front, queries[0]) if len(queries) == 1 else self.workers.run
        start, encoded, hits, message = await run(encode_for_groups, front, queries, deadline=deadline)
        done = time.perf_counter()
        missing: list[str] = []
        found: list[list[Hits]] = []
        if encoded.searched:
            found, missing = await self._ask(message, front, len(encoded.searched), deadline)
        searched = time.perf_counter()
        times = start, done, searched

        def describe() -> T:
            return finish(describe_found(front, encoded, hits, found, tuple(missing), times))

        finished: T = await run(describe)
        return finished

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
            NoGroupError: the group that holds the item did not answer.
            BadRequest: as of ``retrieve``.
        """
        check_deadline(deadline)
        start = time.perf_counter()
        front = self.front
        front.check(k, fields)
        if predicates:
            await self.workers.run(front.generation.attributes.check, predicates, deadline=deadline)
        row = front.row_of(item_id)
        vector = await self._vector(front, row, deadline)
        encoded = time.perf_counter()
        query = GroupQuery(k, np.array([row], np.int64), predicates)
        message = pack_search(front.generation_id, front.as_queries(vector[None, :]), [query])
        found, missing = await self._ask(message, front, 1, deadline)
        searched = time.perf_counter()

        def finish() -> bytes:
            items = front.describe_hits(merge_groups([group[0] for group in found], k), fields)
            took = timing(start, encoded, searched)
            return self.noted(
                Answer(front.generation_id, items, "similar", took, missing_groups=tuple(missing))
            )

        return await self.workers.run(finish)

    def check_canaries(self, front: Front, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        """Ask a generation that the groups hold questions whose answers can be checked.

        Where a group is late they are asked again, a few times: first queries read the index from the disk.

        Args:
            front: of the generation.
            wait: runs a coroutine in the event loop and returns what it returns; this is another thread.

        Raises:
            ArtefactError: it answers nonsense.
            TimeoutError: a group did not answer in time, or is away.
        """
        for _ in range(_TRIES - 1):
            with contextlib.suppress(TimeoutError):
                self._check_canaries_once(front, wait)
                return
            time.sleep(_TRY_PAUSE_S)
        self._check_canaries_once(front, wait)

    def _check_canaries_once(self, front: Front, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        def answer(query: Query) -> Answer:
            answer: Answer = wait(self.answers(front, [query]))[0]
            _check_complete(answer.missing_groups)
            return answer

        check_answers(front, answer)
        rows = sampled_rows(front)
        stored = np.stack([wait(self._vector(front, row)) for row in rows.tolist()])

        def best(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            none = np.zeros(0, np.int64)
            message = pack_search(front.generation_id, vectors, [GroupQuery(1, none)] * len(vectors))
            found, missing = wait(self._ask(message, front, len(vectors)))
            _check_complete(missing)
            scores = [[hits.scores.max(initial=-np.inf) for hits in group] for group in found]
            return np.array(scores, np.float32).max(axis=0)

        check_vectors(front.encode_items(rows), stored, best)

    def status(self) -> dict[str, Any]:
        """Return what ``Service`` does, and what was called and how it went, by group."""
        return {**super().status(), "groups": {g.name: dataclasses.asdict(g.counts) for g in self.groups}}

    def _index_recall(self, front: Front, query: Query, item_ids: Sequence[str]) -> float | None:
        """Return the share of the best items of all groups that an answer holds; from another thread.

        Raises:
            GroupUnavailableError: a group did not answer in time.
        """
        encoded = front.encode([query])
        if not encoded.searched:
            return None
        deeper = dataclasses.replace(query, k=query.k + TIES)
        asked = group_query(front, deeper, encoded.inputs[0].excluded)
        message = pack_search(front.generation_id, encoded.vectors, [asked], exact=True)

        async def ask() -> list[bytes]:
            return await asyncio.gather(*(g.call_aside(message, _PROBE_TIMEOUT_S) for g in self.groups))

        assert self._loop is not None
        answers = asyncio.run_coroutine_threadsafe(ask(), self._loop).result()
        found = [unpack_hits(answer, front.generation_id)[0] for answer in answers]
        return front.index_recall_of(merge_groups(found, deeper.k), item_ids, query.k)

    async def _vector(self, front: Front, row: int, deadline: float = math.inf) -> npt.NDArray[np.float32]:
        """Return the vector of an item, [D], as soon as one group has said it.

        Raises:
            NoGroupError: the group that holds it did not answer.
            BadRequest: the deadline has passed, or left that group too little time.
        """
        message = pack_vector_request(front.generation_id, row)
        calls = [asyncio.ensure_future(call) for call in self._calls(message, 1, deadline)]
        missing: list[GroupUnavailableError] = []
        try:
            for first in asyncio.as_completed(calls):
                try:
                    answer = await first
                except GroupUnavailableError as error:
                    # Another may have it: only when all have spoken is it known that it was this one.
                    missing.append(error)
                    continue
                if (vector := unpack_vector(answer)) is not None:
                    return vector
        finally:
            for call in calls:
                call.cancel()
            # The search that follows is not to take replicas for busy that have just been let go.
            await asyncio.gather(*calls, return_exceptions=True)
        raise _no_answer("the part of the index that holds the item did not answer in time", missing)

    def _calls(self, message: bytes, num_queries: int, deadline: float) -> list[Coroutine[Any, Any, bytes]]:
        """Return a call of each group, not begun.

        Raises:
            BadRequest: the deadline has passed.
        """
        # A group answers the queries of a message one after the other.
        own_s = self._deadline_s * num_queries
        check_deadline(deadline)
        # The client has to get the answer too, with what was found.
        timeout_s = min(own_s, _SHARE_OF_DEADLINE * (deadline - time.monotonic()))
        blame = timeout_s >= own_s
        return [group.call(message, timeout_s, blame, num_queries) for group in self.groups]

    async def _ask(
        self, message: bytes, front: Front, num_queries: int, deadline: float = math.inf
    ) -> tuple[list[list[Hits]], list[str]]:
        """Return what each group that answered found, and the names of the others.

        Raises:
            NoGroupError: none did.
            BadRequest: none did, in what time the deadline left.
        """
        calls = self._calls(message, num_queries, deadline)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found, errors, missing = [], [], []
        for group, answer in zip(self.groups, answers, strict=True):
            if isinstance(answer, bytes):
                found.append(unpack_hits(answer, front.generation_id))
            elif isinstance(answer, GroupUnavailableError):
                errors.append(answer)
                missing.append(group.name)
            else:
                raise answer
        if not found:
            raise _no_answer("no part of the index answered in time", errors)
        return found, missing


def _no_answer(reason: str, errors: Sequence[GroupUnavailableError]) -> Exception:
    """Return what to raise where groups are missing that an answer needs.

    Args:
        reason: what is missing, for where that is the groups' own fault.
        errors: of those groups.
    """
    # A group that was cut short may have been about to answer: what was missing is the client's time.
    if any(isinstance(error, CutShortError) for error in errors):
        return deadline_exceeded()
    return NoGroupError(reason)


def _check_complete(missing: Sequence[str]) -> None:
    """Refuse an answer that says nothing about a generation.

    Raises:
        TimeoutError: groups are missing.
    """
    if missing:
        raise TimeoutError(f"{', '.join(missing)} did not answer in time")
