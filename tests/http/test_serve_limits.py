"""Queue, deadlines and bodies, on the application without a server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Message

from serve.admission import Admission, Bodies
from serve.api import make_api
from serve.fused import FusedService, Service
from serve.schemas import BadRequest
from tests.http.asgi import Answer, ask
from tests.http.limited import LIMITS, MAX_QUEUED, WORKERS, make_service, retrieve
from twotower.retrieval.retriever import Retriever


@pytest.fixture
def service(library: Retriever) -> Service:
    return make_service(library)


@pytest.fixture
def api(service: Service) -> FastAPI:
    return make_api(service)


class Gate:
    """Work that does not end until the gate is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun = threading.Semaphore(0)
        self.done = 0

    def work(self) -> None:
        self.begun.release()
        assert self.opened.wait(30)
        self.done += 1

    async def ask(self, service: Service) -> None:
        """Do the work as a request does."""
        with service.admission.enter():
            await service.workers.run(self.work)

    async def occupy(self, service: Service, count: int) -> list[asyncio.Task[None]]:
        """Begin as much work as there are workers, and return once all of them are busy."""
        tasks = [asyncio.create_task(self.ask(service)) for _ in range(count)]
        for _ in range(min(count, WORKERS)):
            await asyncio.to_thread(self.begun.acquire)
        return tasks


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that is open at the end, so that no thread is left waiting."""
    gate = Gate()
    yield gate
    gate.opened.set()


def test_more_than_the_queue_holds_is_refused_at_once(api: FastAPI, service: Service, gate: Gate) -> None:
    async def run() -> None:
        tasks = await gate.occupy(service, WORKERS)
        waiting = [asyncio.create_task(retrieve(api)) for _ in range(MAX_QUEUED)]
        await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        for refused in await asyncio.gather(retrieve(api), retrieve(api), similar(api)):
            assert refused.status == 503
            assert refused.error["code"] == "overloaded"
            assert refused.headers["retry-after"] == "1"
        assert not any(task.done() for task in waiting)
        gate.opened.set()
        # Those that waited are answered, and afterwards there is room again.
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * MAX_QUEUED
        await asyncio.gather(*tasks)
        assert (await retrieve(api)).status == 200

    asyncio.run(run())


def batch(api: FastAPI, size: int) -> Any:
    body = json.dumps({"requests": [{"k": 3}] * size}).encode()
    return ask(api, "POST", "/v1/retrieve/batch", [body])


@pytest.mark.parametrize("size", range(1, LIMITS.max_batch + 1))
def test_a_batch_counts_as_many_requests_as_it_has(
    api: FastAPI, service: Service, gate: Gate, size: int
) -> None:
    async def run() -> None:
        tasks = await gate.occupy(service, WORKERS)
        waiting = [asyncio.create_task(batch(api, size)) for _ in range(MAX_QUEUED + 2)]
        await asyncio.sleep(0.05)
        gate.opened.set()
        statuses = [answer.status for answer in await asyncio.gather(*waiting)]
        # Whole batches, until there is no room for one more request.
        fit = -(-MAX_QUEUED // size)
        assert sorted(statuses) == [200] * fit + [503] * (len(waiting) - fit)
        await asyncio.gather(*tasks)
        assert (await batch(api, LIMITS.max_batch)).status == 200
        assert (await retrieve(api)).status == 200

    asyncio.run(run())


def test_batches_that_are_read_at_the_same_time_do_not_all_fit() -> None:
    admission = Admission(3)
    with admission.enter() as first, admission.enter() as second:
        first.hold(20)
        with pytest.raises(BadRequest, match="overloaded"):
            second.hold(2)
        with pytest.raises(BadRequest, match="overloaded"), admission.enter():
            pass
    with admission.enter() as alone:
        alone.hold(50)


def similar(api: FastAPI, **arguments: Any) -> Any:
    return ask(api, "GET", "/v1/items/1003/similar", **arguments)


def test_health_is_answered_whatever_waits(api: FastAPI, service: Service, gate: Gate) -> None:
    async def run() -> None:
        tasks = await gate.occupy(service, WORKERS + MAX_QUEUED)
        for path in ("/healthz", "/readyz", "/v1/generation"):
            assert (await ask(api, "GET", path)).status == 200
        assert not any(task.done() for task in tasks)
        gate.opened.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_clients_that_have_gone_leave_their_place(api: FastAPI, service: Service, gate: Gate) -> None:
    async def run() -> None:
        tasks = await gate.occupy(service, WORKERS)
        for _ in range(4):
            gone = [asyncio.create_task(gate.ask(service)) for _ in range(MAX_QUEUED)]
            await asyncio.sleep(0.01)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
        waiting = [asyncio.create_task(retrieve(api)) for _ in range(MAX_QUEUED)]
        await asyncio.sleep(0.05)
        assert (await retrieve(api)).status == 503
        gate.opened.set()
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * MAX_QUEUED
        await asyncio.gather(*tasks)
        # The work of those that went was not done.
        assert gate.done == WORKERS

    asyncio.run(run())


@pytest.mark.parametrize("route", [retrieve, similar])
def test_work_does_not_begin_after_the_deadline(
    api: FastAPI, service: Service, gate: Gate, route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        tasks = await gate.occupy(service, WORKERS)
        late = asyncio.create_task(route(api, headers=[("X-Deadline-Ms", "5")]))
        patient = asyncio.create_task(route(api, headers=[("X-Deadline-Ms", "60000")]))
        await asyncio.sleep(0.1)
        begun: list[str] = []
        for name in ("retrieve", "similar"):
            method = getattr(service.front, name)
            monkeypatch.setattr(
                service.front, name, lambda *a, method=method: [begun.append("x"), method(*a)][1]
            )
        gate.opened.set()
        answer: Answer = await late
        assert answer.status == 504
        assert answer.error["code"] == "deadline_exceeded"
        assert (await patient).status == 200
        # The work of the patient one alone was done.
        assert begun == ["x"]
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_the_deadline_of_the_service_holds_where_a_request_brings_none(
    library: Retriever, gate: Gate
) -> None:
    limits = LIMITS.model_copy(update={"deadline_ms": 5})
    service = FusedService(library, 40, WORKERS, {}, limits=limits)
    api = make_api(service)

    async def run() -> None:
        tasks = await gate.occupy(service, WORKERS)
        late = asyncio.create_task(retrieve(api))
        await asyncio.sleep(0.05)
        gate.opened.set()
        assert (await late).status == 504
        await asyncio.gather(*tasks)

    asyncio.run(run())


@pytest.mark.parametrize(
    "values", [["0"], ["-1"], ["1.5"], ["soon"], [""], ["600001"], ["9" * 30], ["\u00b2"], ["5", "5"]]
)
def test_deadlines_that_are_not_allowed(api: FastAPI, values: list[str]) -> None:
    headers = [("X-Deadline-Ms", value) for value in values]
    for route in (retrieve, similar):
        answer = asyncio.run(route(api, headers=headers))
        assert answer.status == 422
        assert "X-Deadline-Ms: is " in answer.error["message"]
        assert "integer from 1 to 600000" in answer.error["allowed"]


def test_a_body_in_many_parts(api: FastAPI) -> None:
    body = b'{"k": 3, "user_id": "5"}'
    answer = asyncio.run(retrieve(api, parts=[body[i : i + 1] for i in range(len(body))]))
    assert answer.status == 200
    assert json.loads(answer.content)["strategy"] == "personal"


def test_a_body_that_does_not_arrive_is_given_up(api: FastAPI) -> None:
    async def run() -> None:
        slow = [asyncio.create_task(retrieve(api, parts=[b'{"k"'], whole=False)) for _ in range(30)]
        await asyncio.sleep(0.02)
        # Slow clients hold no worker.
        assert (await retrieve(api)).status == 200
        assert not any(task.done() for task in slow)
        for answer in await asyncio.wait_for(asyncio.gather(*slow), 20):
            assert answer.status == 408
            assert answer.error["code"] == "body_timeout"
            assert answer.headers["connection"] == "close"
            assert answer.headers["x-request-id"]

    asyncio.run(run())


def test_bodies_that_are_too_large(api: FastAPI) -> None:
    most = LIMITS.max_body_bytes
    fits = b'{"k": 3, "user_id": "' + b"x" * (most - 23) + b'"}'
    assert len(fits) == most
    answer = asyncio.run(retrieve(api, parts=[fits]))
    assert answer.status == 422
    assert "has 39977 characters" in answer.error["message"]
    for arguments in (
        {"parts": [fits, b" "]},
        {"parts": [b" " * 999] * 9999, "whole": False},
        # It is refused before any of it is read.
        {"parts": [b" "], "whole": False, "headers": [("Content-Length", str(2 * most + 1))]},
    ):
        answer = asyncio.run(retrieve(api, **arguments))
        assert answer.status == 413
        assert answer.error["allowed"] == f"at most {most} bytes"
        assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("length", "headers", "num_read"),
    [
        (LIMITS.max_body_bytes + 1, [], 3),
        (LIMITS.max_body_bytes * 2 + 1, [], 0),
        (LIMITS.max_body_bytes + 1, [(b"expect", b"100-continue")], 0),
    ],
)
def test_a_client_who_still_sends_a_body_somewhat_too_large_is_not_cut_off(
    length: int, headers: list[tuple[bytes, bytes]], num_read: int
) -> None:
    read: list[bool] = []

    async def receive() -> Message:
        read.append(True)
        return {"type": "http.request", "body": b" " * (length // 3), "more_body": len(read) < 3}

    async def run() -> None:
        all_headers = [(b"content-length", str(length).encode()), *headers]
        request = Request({"type": "http", "method": "POST", "headers": all_headers}, receive)
        async with Bodies(LIMITS).read(request):
            pass

    with pytest.raises(BadRequest, match="too large"):
        asyncio.run(run())
    assert len(read) == num_read


def test_bodies_that_wait_hold_a_bounded_amount(api: FastAPI, service: Service, gate: Gate) -> None:
    large = json.dumps({"k": 3, "exclude_items": ["x" * 1000] * 6, "features": {"age": 1}}).encode()
    large += b" " * (30_000 - len(large))

    async def run() -> None:
        tasks = await gate.occupy(service, WORKERS)
        # Three of these are all that may be held; they wait for a worker to parse them.
        waiting = [asyncio.create_task(retrieve(api, parts=[large])) for _ in range(3)]
        await asyncio.sleep(0.05)
        refused = await retrieve(api, parts=[b" " * 1000])
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        assert "large bodies" in refused.error["message"]
        assert refused.headers["retry-after"] == "1"
        gate.opened.set()
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * 3
        await asyncio.gather(*tasks)
        assert (await retrieve(api, parts=[large])).status == 200

    asyncio.run(run())


REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({"history": ["1"] * 6}, "history: has 6 entries", "at most 5 entries"),
    ({"exclude_items": ["1"] * 7}, "exclude_items: has 7 entries", "at most 6 entries"),
    ({"allow_items": ["1"] * 7}, "allow_items: has 7 entries", "at most 6 entries"),
    ({"fields": ["title"] * 4}, "fields: has 4 entries", "at most 3 entries"),
    ({"features": {"age": [[[[1]]]]}}, "features: is nested more than 4 deep", "at most 4 levels"),
    ({"filter": {"year": {"gte": [[[1]]]}}}, "filter: is nested more than 4 deep", "at most 4 levels"),
    ({"k": 41}, "k: 41 is out of range", "an integer from 1 to 40"),
]


@pytest.mark.parametrize(("wrong", "message", "allowed"), REQUESTS, ids=range(len(REQUESTS)))
def test_sizes_of_requests(api: FastAPI, wrong: dict[str, Any], message: str, allowed: str) -> None:
    answer = asyncio.run(retrieve(api, parts=[json.dumps({"k": 3, **wrong}).encode()]))
    assert answer.status == 422
    assert message in answer.error["message"]
    assert allowed in answer.error["allowed"]
    batch = json.dumps({"requests": [{"k": 1}, {"k": 3, **wrong}]}).encode()
    answer = asyncio.run(ask(api, "POST", "/v1/retrieve/batch", [batch]))
    assert answer.status == 422
    assert [d["where"] for d in answer.error["details"]] == [f"requests[1].{message.partition(':')[0]}"]


def test_sizes_that_are_just_allowed(api: FastAPI) -> None:
    body = {
        "k": 40,
        "history": ["1"] * 5,
        "exclude_items": ["1"] * 6,
        "allow_items": ["1003"] * 6,
        "fields": ["title", "year", "genres"],
        "filter": {"year": {"any_of": [1990]}},
    }
    assert asyncio.run(retrieve(api, parts=[json.dumps(body).encode()])).status == 200
    batch = {"requests": [{"k": 10}] * 3 + [{"k": 20}]}
    path = "/v1/retrieve/batch"
    assert asyncio.run(ask(api, "POST", path, [json.dumps(batch).encode()])).status == 200
    batch["requests"][0] = {"k": 11}
    answer = asyncio.run(ask(api, "POST", path, [json.dumps(batch).encode()]))
    assert answer.status == 422
    assert "requests: the sum of k is 51" in answer.error["message"]


@pytest.mark.parametrize(
    "path",
    ["/healthz", "/readyz", "/v1/generation", "/docs", "/openapi.json", "/", "/v1/items/1003/similar"],
)
def test_a_newline_makes_it_another_path(api: FastAPI, path: str) -> None:
    assert asyncio.run(ask(api, "GET", path)).status == 200
    for end in ("\n", "\r", "\n\n"):
        answer = asyncio.run(ask(api, "GET", path + end))
        assert (answer.status, answer.error["code"]) == (404, "no_such_path")
        assert answer.error["message"].isprintable()


VALUES: list[tuple[Any, str]] = [
    (True, "true"),
    ([1, None], "[1,null]"),
    ({"a": False}, '{"a":false}'),
    ("old", "'old'"),
]


@pytest.mark.parametrize(("value", "shown"), VALUES, ids=[shown for _, shown in VALUES])
def test_values_are_shown_as_they_were_sent(api: FastAPI, value: Any, shown: str) -> None:
    for wrong, message in (
        ({"features": {"age": value}}, f"'age' has the value {shown}"),
        ({"filter": {"year": {"gte": value}}}, f"filter.year.gte: {shown} is not allowed"),
        ({"filter": {"year": value}}, f"filter.year: {shown} is no object of operators"),
    ):
        if isinstance(value, dict) and "object" in message:
            continue
        answer = asyncio.run(retrieve(api, parts=[json.dumps({"k": 3, **wrong}).encode()]))
        assert answer.status == 422
        assert message in answer.error["message"]


NESTED = [
    b'{"k": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"k": 3, "user_id": ' + b"[" * 500 + b"]" * 500 + b"}",
]


@pytest.mark.parametrize("body", NESTED, ids=["k", "user_id"])
def test_values_that_can_not_be_shown(api: FastAPI, body: bytes) -> None:
    answer = asyncio.run(retrieve(api, parts=[body]))
    assert answer.status == 422
    assert "a value of type list" in answer.error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"k": 3, **{f"key{i}": 1 for i in range(2000)}},
        {"k": 3, "history": [{f"key{i}": 1 for i in range(2000)}]},
        {"k": 3, "history": [None] * 5, "exclude_items": [None] * 6},
        {"k": 3, "x" * 30_000: 1},
        {"k": 3, "fields": ["x" * 30_000]},
        {"k": 3, "features": {"x" * 30_000: 1}},
        {"k": 3, "filter": {"x" * 30_000: {"gte": 1}}},
        {"k": "x" * 30_000},
        {"k": 0.5, "user_id": 1.5, "at": 1, "fields": 1, "features": 1, **{f"key{i}": 1 for i in range(19)}},
    ],
    ids=range(9),
)
def test_answers_to_large_bad_requests_are_small(api: FastAPI, body: dict[str, Any]) -> None:
    single = asyncio.run(retrieve(api, parts=[json.dumps(body).encode()]))
    batch = json.dumps({"requests": [{"k": 1}, body]}).encode()
    for answer in (single, asyncio.run(ask(api, "POST", "/v1/retrieve/batch", [batch]))):
        assert answer.status == 422
        assert len(answer.error["message"]) >= 1
        assert len(answer.error["details"]) <= 20
        assert len(answer.content) < 8_000
