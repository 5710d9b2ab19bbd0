"""Work in the event loop and in threads: which, in which order, and what waits."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serve.api import make_api
from serve.fused import FusedService
from serve.schemas import BadRequest
from serve.workers import Workers
from tests.http.asgi import Answer, ask
from twotower.config import LimitsConfig
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever

WORKERS, MAX_QUEUED = 2, 3


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def workers(waits: list[float]) -> Iterator[Workers]:
    workers = Workers(WORKERS, 1, waits.append)
    yield workers
    workers.close()


@pytest.fixture
def quick(shop: Any) -> Retriever:
    """A retriever that is quick on any machine."""
    retriever = Retriever.open(shop.generation)
    retriever.warm_up()
    assert math.isfinite(retriever.usual_ms)
    retriever._usual_ms = 0.0
    return retriever


def test_short_work_is_done_in_the_loop_and_other_work_is_not(workers: Workers, waits: list[float]) -> None:
    async def run() -> None:
        assert await workers.run_short(threading.get_ident) == threading.get_ident()
        assert await workers.run(threading.get_ident) != threading.get_ident()

    asyncio.run(run())
    assert len(waits) == 2
    assert min(waits) >= 0


def test_short_work_is_done_in_the_order_asked_and_the_loop_turns_between(workers: Workers) -> None:
    events: list[str] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def work(number: int) -> None:
            events.append(f"work {number}")
            loop.call_soon(events.append, f"turn {number}")

        await asyncio.gather(*(workers.run_short(work, number) for number in range(4)))

    asyncio.run(run())
    assert events == [f"{what} {number}" for number in range(4) for what in ("work", "turn")]


def test_short_work_does_not_begin_after_its_deadline_and_fails_alone(workers: Workers) -> None:
    done: list[str] = []

    def fail() -> None:
        raise KeyError("no")

    async def run() -> list[Any]:
        slow = workers.run_short(time.sleep, 0.05)
        late = workers.run_short(done.append, "late", deadline=time.monotonic() + 0.01)
        failing = workers.run_short(fail)
        after = workers.run_short(done.append, "after")
        return await asyncio.gather(slow, late, failing, after, return_exceptions=True)

    _, late, failed, _ = asyncio.run(run())
    assert isinstance(late, BadRequest)
    assert late.status == 504
    assert isinstance(failed, KeyError)
    assert done == ["after"]


def test_requests_that_come_at_once_are_bounded_though_none_of_them_needs_a_thread(quick: Retriever) -> None:
    limits = LimitsConfig(max_queued=MAX_QUEUED)
    service = FusedService(quick, 40, WORKERS, {"active": {}, "missing": {}}, limits=limits)
    threads: set[int] = set()
    noted = service.noted

    def note(answer: Any) -> bytes:
        threads.add(threading.get_ident())
        return noted(answer)

    service.noted = note  # type: ignore[method-assign]
    api = make_api(service)

    async def run() -> list[Answer]:
        threads.clear()
        asked = [ask(api, "POST", "/v1/retrieve", [b'{"k": 3}']) for _ in range(WORKERS + MAX_QUEUED + 4)]
        answers = await asyncio.gather(*asked)
        assert threads == {threading.get_ident()}
        return [*answers, await ask(api, "POST", "/v1/retrieve", [b'{"k": 3}'])]

    statuses = [answer.status for answer in asyncio.run(run())]
    assert statuses == [200] * (WORKERS + MAX_QUEUED) + [503] * 4 + [200]
    service.close()


def test_what_is_quick(quick: Retriever, shop: Any) -> None:
    item = quick._item_ids.id(0)
    user = quick.generation.user_ids.id(0)
    assert quick.usual(Query(k=100, user_id=user))
    assert quick.usual(Query(k=100, history=[HistoryItem(item)] * 20, exclude_items=[item], filter={}))
    assert not quick.usual(Query(k=1_000))
    assert not quick.usual(Query(k=10, history=[HistoryItem(item)] * 5_000))
    assert not quick.usual(Query(k=10, exclude_items=[item] * 5_000))
    assert not quick.usual(Query(k=10, allow_items=[item]))
    assert quick.usual(Query(k=10, features={"age": 30, "group": "red"}))
    assert not quick.usual(Query(k=10, features={"group": "x" * 100_000}))
    assert not quick.usual(Query(k=10, features={"groups": ["x"] * 1_000}))
    assert not quick.usual(Query(k=10, features={f"{number}": 1 for number in range(1_000)}))
    assert not quick.usual(Query(k=10, filter={"genres": {"any_of": ["Comedy"]}}))


@pytest.mark.parametrize(
    ("usual_ms", "inline_ms", "inline"), [(1.5, 2.0, True), (1.5, 1.0, False), (0.1, 0.0, False)]
)
def test_only_where_queries_are_quick_does_the_loop_answer(
    quick: Retriever, usual_ms: float, inline_ms: float, inline: bool
) -> None:
    quick._usual_ms = usual_ms
    service = FusedService(quick, 40, WORKERS, {"active": {}, "missing": {}}, inline_ms=inline_ms)
    assert (service.runner(quick, Query(k=10)) == service.workers.run_short) == inline
    # Whatever the catalogue, these take longer.
    assert service.runner(quick, Query(k=1_000)) == service.workers.run
    service.close()


def test_before_the_first_answers_nothing_is_known_to_be_quick(shop: Any) -> None:
    assert Retriever.open(shop.generation).usual_ms == math.inf


def test_a_user_who_has_had_much_is_not_quick(quick: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    user = quick.generation.user_ids.id(0)
    had = quick._inputs.num_seen(user)
    assert had > 0
    assert quick._inputs.num_seen(None) == quick._inputs.num_seen("nobody") == 0
    monkeypatch.setattr("twotower.retrieval.front._FEW_SEEN", had - 1)
    assert not quick.usual(Query(k=10, user_id=user))
    assert quick.usual(Query(k=10, user_id="nobody"))
