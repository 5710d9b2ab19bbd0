"""Queries that are answered together: each gets its own answer, or its own error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from serve.batching import Batcher
from serve.fused import FusedService
from serve.schemas import BadRequest
from serve.service import to_json
from tests.shop import NUM_USERS, build_store
from twotower.errors import NotAllowedError
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever

LONG_MS = 60_000.0
"""A window that ends in no test."""


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    return Retriever.open(build_store(tmp_path_factory.mktemp("store"))[2])


class Work:
    """Answers with the query's k, and notes the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, queries: Sequence[Query]) -> list[bytes | Exception]:
        self.batches.append([query.k for query in queries])
        await self.go.wait()
        return [ValueError(str(q.k)) if q.k == 13 else str(q.k).encode() for q in queries]


def test_queries_of_a_moment_are_one_batch() -> None:
    async def run() -> None:
        work = Work()
        batcher = Batcher(work, window_ms=1.0)
        answers = await asyncio.gather(*(batcher.answer(Query(k=k)) for k in range(1, 6)))
        assert answers == [b"1", b"2", b"3", b"4", b"5"]
        assert work.batches == [[1, 2, 3, 4, 5]]
        assert await batcher.answer(Query(k=6)) == b"6"
        assert work.batches[1:] == [[6]]

    asyncio.run(run())


def test_a_full_batch_does_not_wait_and_batches_run_side_by_side() -> None:
    async def run() -> None:
        work = Work()
        work.go.clear()
        batcher = Batcher(work, LONG_MS, max_batch=3)
        asked = [asyncio.create_task(batcher.answer(Query(k=k))) for k in range(1, 8)]
        while len(work.batches) < 2:
            await asyncio.sleep(0)
        assert work.batches == [[1, 2, 3], [4, 5, 6]]
        work.go.set()
        assert await asyncio.gather(*asked[:6]) == [str(k).encode() for k in range(1, 7)]
        assert not asked[6].done()
        asked[6].cancel()

    asyncio.run(run())


def test_an_error_is_that_of_one_query_only() -> None:
    async def run() -> None:
        batcher = Batcher(Work(), window_ms=1.0)
        tasks = [batcher.answer(Query(k=k)) for k in (12, 13, 14)]
        found: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        assert (found[0], str(found[1]), found[2]) == (b"12", "13", b"14")
        assert isinstance(found[1], ValueError)

    asyncio.run(run())


def test_a_failure_of_the_whole_batch_reaches_everyone() -> None:
    async def fail(queries: Sequence[Query]) -> list[bytes | Exception]:
        raise MemoryError("none left")

    async def run() -> None:
        batcher = Batcher(fail, window_ms=1.0)
        found = await asyncio.gather(*(batcher.answer(Query(k=k)) for k in (1, 2)), return_exceptions=True)
        assert [str(error) for error in found] == ["none left"] * 2

    asyncio.run(run())


def test_who_has_gone_is_not_answered() -> None:
    async def run() -> None:
        work = Work()
        batcher = Batcher(work, LONG_MS, max_batch=3)
        gone = asyncio.create_task(batcher.answer(Query(k=1)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        assert await asyncio.gather(*(batcher.answer(Query(k=k)) for k in (2, 3))) == [b"2", b"3"]
        assert work.batches == [[2, 3]]

    asyncio.run(run())


QUERIES = [
    *(Query(k=5 + u % 3, user_id=str(u)) for u in range(NUM_USERS)),
    Query(k=4),
    Query(k=6, history=[HistoryItem("1001")], fields=["title"]),
    Query(k=6, user_id="4", filter={"year": {"gte": 1980}}),
]
REFUSED = [
    Query(k=5, user_id="1", fields=["nothing"]),
    Query(k=5, filter={"colour": {"any_of": ["red"]}}),
    Query(k=5, features={"height": 3}),
]


@pytest.mark.parametrize("window_ms", [0.0, 1.0])
def test_answers_are_those_of_single_queries(retriever: Retriever, window_ms: float) -> None:
    service = FusedService(retriever, 200, 2, {}, batch_window_ms=window_ms)

    async def run() -> list[Any]:
        asked = [*QUERIES[:20], REFUSED[0], *QUERIES[20:], *REFUSED[1:]]
        return await asyncio.gather(*(service.retrieve(query) for query in asked), return_exceptions=True)

    found = asyncio.run(run())
    service.close()
    refused = [answer for answer in found if isinstance(answer, Exception)]
    assert [type(error) for error in refused] == [NotAllowedError] * 3
    for error, name in zip(refused, ["nothing", "colour", "height"], strict=True):
        assert name in str(error)
    answers = [json.loads(answer) for answer in found if isinstance(answer, bytes)]
    assert len(answers) == len(QUERIES)
    timings = {json.dumps(answer["timing_ms"]) for answer in answers}
    # Those of a batch share their timings, single ones have their own.
    assert (len(timings) < len(QUERIES) / 2) == (window_ms > 0)
    for answer, query in zip(answers, QUERIES, strict=True):
        single = json.loads(to_json(retriever.retrieve(query)))
        assert answer["strategy"] == single["strategy"]
        assert [i["item_id"] for i in answer["items"]] == [i["item_id"] for i in single["items"]]
        scores = [i["score"] for i in single["items"]]
        assert [i["score"] for i in answer["items"]] == pytest.approx(scores, abs=1e-6)
        assert [i.get("title") for i in answer["items"]] == [i.get("title") for i in single["items"]]


def test_a_query_whose_deadline_has_passed_is_not_answered_and_others_are(retriever: Retriever) -> None:
    service = FusedService(retriever, 200, 1, {}, batch_window_ms=1.0)

    async def run() -> tuple[list[Any], list[Any]]:
        now = time.monotonic()
        some = (service.retrieve(QUERIES[u], now + (-1 if u % 3 == 0 else 60)) for u in range(6))
        none = (service.retrieve(QUERIES[u], now - 1) for u in range(3))
        return (
            await asyncio.gather(*some, return_exceptions=True),
            await asyncio.gather(*none, return_exceptions=True),
        )

    some, none = asyncio.run(run())
    service.close()
    for user in (0, 3):
        assert isinstance(some[user], BadRequest)
        assert some[user].status == 504
    assert [type(error) for error in none] == [BadRequest] * 3
    for user in (1, 2, 4, 5):
        single = retriever.retrieve(QUERIES[user])
        assert [i["item_id"] for i in json.loads(some[user])["items"]] == [i["item_id"] for i in single.items]


def test_a_cpu_does_not_wait(retriever: Retriever) -> None:
    if retriever.on_gpu:
        pytest.skip("this machine has a GPU")
    service = FusedService(retriever, 200, 1, {})
    assert service._batcher is None
    service.close()


@pytest.mark.gpu
def test_the_query_tower_on_a_gpu_answers_as_on_the_cpu(retriever: Retriever) -> None:
    other = Retriever.open(retriever.generation.path, device="cuda")
    assert other.on_gpu
    service = FusedService(other, 200, 1, {})
    assert service._batcher is not None
    service.close()
    for query in QUERIES:
        mine, theirs = other.retrieve(query).items, retriever.retrieve(query).items
        assert [i["score"] for i in mine] == pytest.approx([i["score"] for i in theirs], abs=1e-5)
