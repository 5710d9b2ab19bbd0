"""Queue, deadlines, bodies and the token, on the application without a server."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Message

from serve.admission import Bodies
from serve.api import make_api
from serve.fused import FusedService, Service
from serve.middleware import MIN_TOKEN_LENGTH, OPEN, read_token
from serve.schemas import BadRequest
from tests.http.asgi import Answer, ask
from twotower.config import LimitsConfig
from twotower.errors import ConfigError
from twotower.retrieval.retriever import Retriever

TOKEN = "correct-horse-battery-staple"
WORKERS, MAX_QUEUED = 2, 3
LIMITS = LimitsConfig(
    max_batch=4,
    max_batch_k=50,
    max_history=5,
    max_ids=6,
    max_fields=3,
    max_body_bytes=40_000,
    max_held_bytes=90_000,
    body_timeout_s=0.2,
    max_queued=MAX_QUEUED,
)


def make_service(library: Retriever) -> Service:
    return FusedService(library, 40, WORKERS, {"active": {}, "missing": {}}, limits=LIMITS)


@pytest.fixture
def service(library: Retriever) -> Service:
    return make_service(library)


@pytest.fixture
def api(service: Service) -> FastAPI:
    return make_api(service)


def retrieve(api: FastAPI, **arguments: Any) -> Any:
    return ask(api, "POST", "/v1/retrieve", **{"parts": [b'{"k": 3}'], **arguments})


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


def test_only_the_token_opens_what_is_not_open(service: Service) -> None:
    api = make_api(service, token=TOKEN)
    good = [("Authorization", f"Bearer {TOKEN}")]
    bad: list[list[tuple[str, str]]] = [
        [],
        [("Authorization", "")],
        [("Authorization", TOKEN)],
        [("Authorization", "Bearer")],
        [("Authorization", f"Basic {TOKEN}")],
        [("Authorization", f"Bearer {TOKEN[:-1]}")],
        [("Authorization", f"Bearer {TOKEN}x")],
        [("Authorization", f"Bearer {TOKEN.upper()}")],
        [("Authorization", "Bearer \u00e4")],
        [*good, *good],
        [("X-Token", TOKEN)],
    ]

    async def run() -> None:
        for headers in bad:
            for method, path in (
                ("POST", "/v1/retrieve"),
                ("POST", "/v1/retrieve/batch"),
                ("GET", "/v1/generation"),
                ("GET", "/v1/items/1003/similar"),
                ("GET", "/v1/nothing"),
                ("GET", "/demo/users"),
                ("GET", "//v1/generation"),
            ):
                # The body is not read: it would not end.
                answer = await ask(api, method, path, [b"{"], headers, whole=False)
                assert answer.status == 401, (headers, path)
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert answer.headers["x-request-id"]
                assert answer.error["code"] == "unauthorized"
                assert TOKEN not in answer.content.decode()
        for headers in (good, [("authorization", f"bearer  {TOKEN}")]):
            assert (await retrieve(api, headers=headers)).status == 200
            assert (await ask(api, "GET", "/v1/generation", headers=headers)).status == 200
        for path in OPEN:
            assert (await ask(api, "GET", path)).status in (200, 404)
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert (await ask(api, "GET", path)).status == 200
        # Served at a prefix, the same paths are open.
        assert (await ask(api, "GET", "/shop/healthz", root_path="/shop")).status == 200
        assert (await ask(api, "GET", "/shop/v1/generation", root_path="/shop")).status == 401
        document = json.loads((await ask(api, "GET", "/openapi.json")).content)
        assert document["paths"]["/v1/retrieve"]["post"]["security"] == [{"token": []}]
        assert "401" in document["paths"]["/v1/retrieve"]["post"]["responses"]
        assert "security" not in document["paths"]["/healthz"]["get"]

    asyncio.run(run())


def test_files_of_a_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert read_token(path) == TOKEN
    for content, message in (
        (b"", "holds no token"),
        (b"short", f"at least {MIN_TOKEN_LENGTH}"),
        (b"two words that are long enough", "holds no token"),
        (b"two\nlines-that-are-long-enough", "holds no token"),
        ("\u00e4".encode() * 20, "not ASCII"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as error:
            read_token(path)
        assert not content or content.decode() not in str(error.value)
    with pytest.raises(ConfigError, match="can not be read"):
        read_token(tmp_path / "nothing")


@pytest.mark.parametrize("log_user_ids", [False, True])
def test_a_failure_says_nothing_about_the_request(
    library: Retriever,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    log_user_ids: bool,
) -> None:
    service = make_service(library)
    api = make_api(service, log_user_ids=log_user_ids)

    class Broken:
        usual_ms = 0.0

        def usual(self, query: Any) -> bool:
            return True

        def retrieve(self, query: Any) -> Any:
            raise RuntimeError(f"no row for user {query.user_id}") from KeyError(query.user_id)

    monkeypatch.setattr(service, "_front", Broken())
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "level", logging.WARNING)
    answer = asyncio.run(retrieve(api, parts=[b'{"k": 3, "user_id": "marker-7781"}']))
    assert answer.status == 500
    assert answer.error == {
        "code": "internal_error",
        "message": "the service failed to answer; the reason is in its log",
        "allowed": "try again",
        "details": [],
    }
    assert answer.headers["x-request-id"]
    assert "a request failed" in caplog.text
    assert "RuntimeError" in caplog.text
    assert "in retrieve" in caplog.text
    assert ("marker-7781" in caplog.text) == log_user_ids
