"""The client against a real server on this machine that misbehaves in every way the client must bear."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest

from tests.scripted import GOOD, Server, busy, drop, good, scripted_server, send, then
from twotower.client import Client, Item, ServiceError
from twotower.errors import ConfigError

pytestmark = pytest.mark.sockets


@pytest.fixture
def server() -> Iterator[Server]:
    with scripted_server() as server:
        yield server


def test_a_request_and_its_answer(server):
    server.script = good
    at = datetime(2026, 1, 31, 10, tzinfo=UTC)
    with Client(server.url + "/some/path/", token="secret") as client:
        answer = client.retrieve(
            user_id=np.int64(42),
            k=2,
            history=["1", {"item_id": 50, "time": at, "weight": 0.75}],
            at=at,
            filter={"year": {"gte": 1990}},
            fields=["title"],
            request_id="mine",
        )
    assert answer.items == [Item("5", 0.5, {"title": "Heat"}), Item("a/b", 0.25, {"title": None})]
    assert (answer.generation, answer.strategy, answer.partial) == ("g7", "personal", True)
    assert (answer.missing_groups, answer.timing_ms["total"], answer.request_id) == (["1"], 0.3, "mine")
    (request,) = server.received
    assert (request.method, request.path) == ("POST", "/some/path/v1/retrieve")
    assert request.json == {
        "user_id": 42,
        "k": 2,
        "history": ["1", {"item_id": 50, "time": "2026-01-31T10:00:00+00:00", "weight": 0.75}],
        "at": "2026-01-31T10:00:00+00:00",
        "filter": {"year": {"gte": 1990}},
        "fields": ["title"],
    }
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["x-request-id"] == "mine"
    assert request.headers["content-type"] == "application/json"
    assert "secret" not in repr(client)


def test_similar_items_and_the_generation(server):
    server.script = then(good, lambda handler, _: send(handler, {"id": "g7", "num_items": 3}))
    with Client(server.url) as client:
        answer = client.similar("a/b c", k=3, fields=["title", "year"], filter={"year": {"gte": 1990}})
        assert client.generation() == {"id": "g7", "num_items": 3}
    assert [item.item_id for item in answer.items] == ["5", "a/b"]
    similar, generation = server.received
    path, _, query = similar.path.partition("?")
    assert (similar.method, path) == ("GET", "/v1/items/a%2Fb%20c/similar")
    assert query == "k=3&fields=title%2Cyear&filter=%7B%22year%22%3A%7B%22gte%22%3A1990%7D%7D"
    assert (generation.method, generation.path) == ("GET", "/v1/generation")
    assert "authorization" not in generation.headers


def test_a_batch_has_an_answer_for_each_request(server):
    other = {**GOOD, "strategy": "popular"}
    server.script = lambda handler, _: send(handler, {"answers": [GOOD, other]})
    with Client(server.url) as client:
        answers = client.retrieve_batch([{"k": 2, "user_id": "1"}, {"k": 3}])
        assert [a.strategy for a in answers] == ["personal", "popular"]
        assert server.received[0].json == {"requests": [{"k": 2, "user_id": "1"}, {"k": 3}]}
        assert server.received[0].path == "/v1/retrieve/batch"
        with pytest.raises(ServiceError, match="no list of 1 answers"):
            client.retrieve_batch([{"k": 2}])


def test_calls_share_a_connection_and_have_ids_of_their_own(server):
    server.script = good
    with Client(server.url) as client:
        answers = [client.retrieve(k=2) for _ in range(4)]
    assert len({request.peer for request in server.received}) == 1
    ids = [request.headers["x-request-id"] for request in server.received]
    assert len(set(ids)) == 4
    assert [answer.request_id for answer in answers] == ids


def test_threads_share_a_client(server):
    def own(handler: BaseHTTPRequestHandler, number: int) -> None:
        send(handler, {**GOOD, "generation": server.received[number].json["user_id"]})

    server.script = own
    with Client(server.url, timeout_s=20, connections=8) as client, ThreadPoolExecutor(8) as pool:
        names = [f"user {n}" for n in range(200)]
        answers = list(pool.map(lambda name: client.retrieve(k=1, user_id=name).generation, names))
    assert answers == names
    assert len({request.peer for request in server.received}) <= 8


@pytest.mark.parametrize(
    "content",
    [
        b"<html>a proxy's page</html>",
        b"\xff\xfe\x00",
        b"",
        [GOOD],
        {},
        {**GOOD, "items": None},
        {**GOOD, "items": [{"item_id": "5"}]},
        {**GOOD, "items": [{"item_id": "5", "score": "high"}]},
        {**GOOD, "timing_ms": 3},
    ],
)
def test_garbage_is_no_answer(server, content):
    server.script = lambda handler, _: send(handler, content)
    with Client(server.url) as client, pytest.raises(ServiceError, match="no answer of twotower") as raised:
        client.retrieve(k=2)
    assert (raised.value.code, raised.value.status) == ("bad_answer", 200)
    assert len(server.received) == 1


def test_what_is_no_http_is_no_answer(server):
    def babble(handler: BaseHTTPRequestHandler, number: int) -> None:
        handler.wfile.write(b"220 mail ready\r\n\r\n")
        drop(handler, number)

    server.script = babble
    with Client(server.url) as client, pytest.raises(ServiceError) as raised:
        client.retrieve(k=2)
    assert raised.value.code == "no_connection"


def test_a_chunked_answer_is_read_whole(server):
    def chunked(handler: BaseHTTPRequestHandler, number: int) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        body = json.dumps(GOOD).encode()
        for start in range(0, len(body), 7):
            part = body[start : start + 7]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    server.script = chunked
    with Client(server.url) as client:
        assert [client.retrieve(k=2).items[1].item_id for _ in range(3)] == ["a/b"] * 3
    assert len({request.peer for request in server.received}) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 504])
def test_a_refusal_says_what_the_service_says_and_is_final(server, status):
    details = [{"where": "k", "message": "0 is out of range", "allowed": "an integer from 1 to 9"}]
    content = {
        "error": {
            "code": "invalid_request",
            "message": "k: 0 is out of range",
            "allowed": "1 to 9",
            "details": details,
        }
    }
    server.script = lambda handler, _: send(handler, content, status, X_Request_ID="theirs")
    with Client(server.url) as client, pytest.raises(ServiceError) as raised:
        client.retrieve(k=0)
    error = raised.value
    assert (error.status, error.details, error.request_id) == (status, details, "theirs")
    assert str(error) == f"{status} invalid_request: k: 0 is out of range; allowed: 1 to 9 (request theirs)"
    assert len(server.received) == 1
    assert len({error, error}) == 1
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.details) == (str(error), details)


@pytest.mark.parametrize("content", [b"<html>Bad gateway</html>", {"detail": "no"}, {"error": "no"}])
def test_an_error_of_another_shape(server, content):
    server.script = lambda handler, _: send(handler, content, 502)
    with Client(server.url) as client, pytest.raises(ServiceError) as raised:
        client.retrieve(k=2)
    assert (raised.value.code, raised.value.status) == ("bad_answer", 502)


def test_redirects_are_not_followed_with_the_token(server):
    server.script = lambda handler, _: send(handler, b"", 307, Location="http://127.0.0.1:9/")
    with Client(server.url, token="secret") as client, pytest.raises(ServiceError) as raised:
        client.retrieve(k=2)
    assert (raised.value.code, raised.value.status) == ("bad_answer", 307)


def test_ready(server):
    refused = {"error": {"code": "unauthorised", "message": "no token", "allowed": "a token", "details": []}}
    server.script = then(
        busy,
        drop,
        lambda handler, _: send(handler, {"status": "ready"}),
        lambda handler, _: send(handler, refused, 401),
    )
    with Client(server.url) as client:
        assert [client.ready() for _ in range(3)] == [False, False, True]
        with pytest.raises(ServiceError, match="401 unauthorised"):
            client.ready()
    assert [request.path for request in server.received] == ["/readyz"] * 4


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host/?k=1"])
def test_what_is_no_address(url):
    with pytest.raises(ConfigError, match="no address of a service"):
        Client(url)


@pytest.mark.parametrize(
    "values", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"retries": -1}, {"connections": 0}]
)
def test_numbers_that_are_not_allowed(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Client("http://127.0.0.1:8000", **values)


def test_the_client_is_light():
    heavy = "{'torch', 'faiss', 'ray', 'numpy', 'pyarrow', 'pandas', 'pydantic'}"
    code = f"import sys, twotower.client; print(sorted({heavy} & set(sys.modules)), 'urllib3' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[] True"
