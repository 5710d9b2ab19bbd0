"""Bad requests: each gets a 4xx of one shape that says what was wrong and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service import Client, Reply, Shop

MAX_K = 200
K = "an integer from 1 to 200"
ID = "text of 1 to 1024 characters without control characters, or an integer"


def check(reply: Reply, shop: Shop, status: int, message: str, allowed: str) -> None:
    assert reply.status == status, reply.content
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    assert set(reply.json) == {"error"}
    error = reply.json["error"]
    assert set(error) == {"code", "message", "allowed", "details"}
    assert message in error["message"]
    assert allowed in error["allowed"]
    for detail in error["details"]:
        assert set(detail) == {"where", "message", "allowed"}
        assert detail["message"]
        assert detail["allowed"]
    text = reply.content.decode()
    assert str(shop.config.storage.path) not in text
    assert "Traceback" not in text
    assert ".py" not in text


BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "k: is missing", K),
    ({"k": 0}, "k: 0 is out of range", K),
    ({"k": -1}, "k: -1 is out of range", K),
    ({"k": MAX_K + 1}, "k: 201 is out of range", K),
    ({"k": 10**18}, "out of range", K),
    ({"k": 10**30}, "k: 1e", K),
    ({"k": "5"}, 'k: "5" is not allowed', K),
    ({"k": 5.0}, "k: 5.0 is not allowed", K),
    ({"k": True}, "k: true is not allowed", K),
    ({"k": None}, "k: null is not allowed", K),
    ({"k": [5]}, "k: [5] is not allowed", K),
    ({"k": 5, "user_id": 42.0}, "user_id: 42.0 is no id", ID),
    ({"k": 5, "user_id": True}, "user_id: true is no id", ID),
    ({"k": 5, "user_id": ""}, "has 0 characters", ID),
    ({"k": 5, "user_id": "x" * 1025}, "has 1025 characters", ID),
    ({"k": 5, "user_id": ["1"]}, 'user_id: ["1"] is no id', ID),
    ({"k": 5, "user_id": 10**30}, "is no id", ID),
    ({"k": 5, "userid": "1"}, "userid: there is no such key; did you mean 'user_id'?", "k, user_id, history"),
    ({"k": 5, "K": 5}, "K: there is no such key", "k, user_id, history"),
    ({"k": 5, "exclude": []}, "did you mean 'exclude_", "exclude_items"),
    ({"k": 5, "history": "1"}, 'history: "1" is not allowed', "oldest first"),
    ({"k": 5, "history": {"1": 2}}, "history: ", "oldest first"),
    ({"k": 5, "history": [1.5]}, "history[0].item_id: 1.5 is no id", ID),
    ({"k": 5, "history": ["1", None]}, "history[1].item_id: null is no id", ID),
    ({"k": 5, "history": ["1", False]}, "history[1].item_id: false is no id", ID),
    ({"k": 5, "history": [["1"]]}, "history[0].item_id", ID),
    ({"k": 5, "history": [{}]}, "history[0].item_id: is missing", ID),
    (
        {"k": 5, "history": [{"item": "1"}]},
        "history[0].item: there is no such key; did you mean 'item_id'?",
        "item_id",
    ),
    ({"k": 5, "history": [{"item_id": "1", "time": 5}]}, "history[0].time: 5 is no time", "ISO 8601"),
    ({"k": 5, "history": [{"item_id": "1", "time": "soon"}]}, '"soon" is no ISO 8601 time', "ISO 8601"),
    ({"k": 5, "history": [{"item_id": "1", "weight": "1"}]}, "history[0].weight", "a number"),
    ({"k": 5, "history": [{"item_id": "1", "weight": None}]}, "history[0].weight: null", "a number"),
    ({"k": 5, "history": [{"item_id": "1", "weight": True}]}, "history[0].weight: true", "a number"),
    ({"k": 5, "history": [{"item_id": "1001", "weight": 1e300}]}, "history[0].weight: 1e+300", "1e+15"),
    ({"k": 5, "features": []}, "features: [] is not allowed", "an object"),
    ({"k": 5, "features": {"age": 1e300}}, "1e+300 is over 1e+15 standard deviations away", "a number"),
    ({"k": 5, "features": {"shoe_size": 9}}, "the model has no user column 'shoe_size'", "age, group"),
    ({"k": 5, "features": {"age": "old"}}, "'age' has the value 'old'", "a number"),
    ({"k": 5, "features": {"age": True}}, "'age' has the value true", "a number"),
    ({"k": 5, "features": {"age": [1, None]}}, "'age' has the value [1,null]", "a number"),
    ({"k": 5, "features": {"group": ["red"]}}, "'group' has the value", "a text or a number"),
    ({"k": 5, "at": 1_700_000_000}, "at: 1700000000 is no time", "ISO 8601"),
    ({"k": 5, "at": "yesterday"}, 'at: "yesterday" is no ISO 8601 time', "ISO 8601"),
    ({"k": 5, "at": "2026-13-01"}, "is no ISO 8601 time", "ISO 8601"),
    ({"k": 5, "at": ""}, "is no ISO 8601 time", "ISO 8601"),
    ({"k": 5, "exclude_seen": "yes"}, 'exclude_seen: "yes" is not allowed', "true or false"),
    ({"k": 5, "exclude_seen": 1}, "exclude_seen: 1 is not allowed", "true or false"),
    ({"k": 5, "exclude_items": "1"}, 'exclude_items: "1" is not allowed', "a list of item ids"),
    ({"k": 5, "exclude_items": [1.5]}, "exclude_items[0]: 1.5 is no id", ID),
    ({"k": 5, "exclude_items": None}, "exclude_items: null is not allowed", "a list of item ids"),
    ({"k": 5, "fields": "title"}, 'fields: "title" is not allowed', "a list of names"),
    ({"k": 5, "fields": [1]}, "fields[0]: 1 is not allowed", "a list of names"),
    ({"k": 5, "fields": ["colour"]}, "items have no column 'colour'", "title"),
    ({"k": 5, "allow_items": "1"}, 'allow_items: "1" is not allowed', "a list of item ids; or null"),
    ({"k": 5, "allow_items": [1.5]}, "allow_items[0]: 1.5 is no id", ID),
    ({"k": 5, "filter": [["year", "gte", 1990]]}, "filter: [[", "an object such as"),
    ({"k": 5, "filter": "year"}, 'filter: "year" is not allowed', "an object such as"),
    ({"k": 5, "filter": {"colour": {"any_of": ["red"]}}}, "items have no attribute 'colour'", "genres, year"),
    (
        {"k": 5, "filter": {"year": {"above": 1990}}},
        "filter.year: 'above' is no operator",
        "gte, gt, lte, lt",
    ),
    ({"k": 5, "filter": {"year": 1990}}, "filter.year: 1990 is no object", "one or more of any_of"),
    ({"k": 5, "filter": {"year": {"gte": "1990"}}}, "filter.year.gte: '1990' is not allowed", "a number"),
    (
        {"k": 5, "filter": {"genres": {"any_of": "War"}}},
        "filter.genres.any_of: 'War'",
        "a list of one or more",
    ),
    ({"k": 5, "filter": {"added": {"lt": "soon"}}}, "filter.added.lt: 'soon' is not", "ISO 8601"),
    ({"k": 5, "filter": {"genres": {"any_of": ["x"] * 1001}}}, "more than 1,000 values", "1,000 in all"),
]


@pytest.mark.parametrize(("body", "message", "allowed"), BODIES, ids=range(len(BODIES)))
def test_values_that_are_not_allowed(
    client: Client, shop: Shop, body: dict[str, Any], message: str, allowed: str
) -> None:
    check(client.retrieve(**body), shop, 422, message, allowed)


BATCHES: list[tuple[Any, list[str], str, str]] = [
    ({}, ["requests"], "requests: is missing", "a list of 1 to 64 requests"),
    ({"requests": None}, ["requests"], "requests: null is not allowed", "a list of 1 to 64 requests"),
    ({"requests": {"k": 5}}, ["requests"], 'requests: {"k":5} is not allowed', "a list of 1 to 64 requests"),
    ({"requests": []}, ["requests"], "requests: has 0 requests", "a list of 1 to 64 requests"),
    ({"requests": [{"k": 1}] * 65}, ["requests"], "requests: has 65 requests", "a list of 1 to 64 requests"),
    (
        {"request": [{"k": 1}]},
        ["request"],
        "request: there is no such key; did you mean 'requests'?",
        "requests",
    ),
    ({"requests": [{"k": 1}], "k": 5}, ["k"], "k: there is no such key", "requests"),
    ({"requests": [{"k": 1}, 5]}, ["requests[1]"], "requests[1]: 5 is not an object", "a request such as"),
    ({"requests": [[]]}, ["requests[0]"], "requests[0]: [] is not an object", "a request such as"),
    ({"requests": [{"k": 1}] * 3 + [{"k": 0}]}, ["requests[3].k"], "requests[3].k: 0 is out of range", K),
    ({"requests": [{"k": 1}, {"user_id": "1"}]}, ["requests[1].k"], "requests[1].k: is missing", K),
    (
        {"requests": [{"k": 1, "history": [1.5]}, {"k": 1, "K": 1}]},
        ["requests[0].history[0].item_id", "requests[1].K"],
        "requests[0].history[0].item_id: 1.5 is no id; requests[1].K: there is no such key",
        ID,
    ),
    (
        {"requests": [{"k": 1}, {"k": 1, "fields": ["colour"]}]},
        ["requests[1]"],
        "requests[1]: fields: items have no column 'colour'",
        "title",
    ),
    (
        {"requests": [{"k": 1}, {"k": 1}, {"k": 1, "filter": {"colour": {"gte": 1}}}]},
        ["requests[2]"],
        "requests[2]: filter: items have no attribute",
        "genres, year",
    ),
    (
        {"requests": [{"k": 1, "features": {"shoe_size": 9}}]},
        ["requests[0]"],
        "requests[0]: features: the model has no user column 'shoe_size'",
        "age, group",
    ),
    ({"requests": [{"k": 200}] * 51}, ["requests"], "requests: the sum of k is 10200", "at most 10000 items"),
]


@pytest.mark.parametrize(("body", "where", "message", "allowed"), BATCHES, ids=range(len(BATCHES)))
def test_batches_that_are_not_allowed(
    client: Client, shop: Shop, body: Any, where: list[str], message: str, allowed: str
) -> None:
    reply = client.send("POST", "/v1/retrieve/batch", body)
    check(reply, shop, 422, message, allowed)
    assert [d["where"] for d in reply.json["error"]["details"]] == where


RAW: list[tuple[bytes, int, str]] = [
    (b"", 400, "the body is not JSON"),
    (b"{", 400, "the body is not JSON"),
    (b"{'k': 5}", 400, "the body is not JSON"),
    (b'{"k": 5,}', 400, "the body is not JSON"),
    (b'{"k": NaN}', 400, "the body is not JSON"),
    (b'{"k": 5} {"k": 6}', 400, "the body is not JSON"),
    (b'{"k": 5, "user_id": "\xff"}', 400, "the body is not JSON"),
    (b'{"k": 5, "user_id": "\\ud800"}', 400, "the body is not JSON"),
    (b"[" * 5_000, 400, "the body is not JSON"),
    (b"[]", 422, "the body is [], not an object"),
    (b"5", 422, "the body is 5, not an object"),
    (b"null", 422, "the body is null, not an object"),
    (b'{"k": 5, "user_id": "' + b"x" * (1 << 20) + b'"}', 413, "the body is too large"),
]


@pytest.mark.parametrize(("body", "status", "message"), RAW, ids=range(len(RAW)))
def test_bodies_that_are_no_requests(
    client: Client, shop: Shop, body: bytes, status: int, message: str
) -> None:
    allowed = "at most 1048576 bytes" if status == 413 else "a JSON object such as"
    for path in ("/v1/retrieve", "/v1/retrieve/batch"):
        check(client.send("POST", path, body), shop, status, message, allowed)


PATHS: list[tuple[str, str, int, str, str]] = [
    ("GET", "/v1/items/nothing/similar", 404, "item 'nothing' is not known", "catalogue"),
    ("GET", "/v1/items/1059/similar", 404, "is not in the catalogue", "catalogue"),
    ("GET", "/v1/items/a%2Fb%20c/similar", 404, "item 'a/b c' is not known", "catalogue"),
    ("GET", "/v1/items/1003/similar?k=0", 422, "k: 0 is out of range", K),
    ("GET", "/v1/items/1003/similar?k=201", 422, "k: 201 is out of range", K),
    ("GET", "/v1/items/1003/similar?k=-1", 422, 'k: is "-1"', K),
    ("GET", "/v1/items/1003/similar?k=5.0", 422, 'k: is "5.0"', K),
    ("GET", "/v1/items/1003/similar?k=five", 422, 'k: is "five"', K),
    ("GET", "/v1/items/1003/similar?k=", 422, 'k: is ""', K),
    ("GET", "/v1/items/1003/similar?k=5&k=6", 422, "k: is", K),
    (
        "GET",
        "/v1/items/1003/similar?kk=5",
        422,
        "kk: there is no such key; did you mean 'k'?",
        "k, fields, filter",
    ),
    ("GET", "/v1/items/1003/similar?fields=colour", 422, "items have no column 'colour'", "title"),
    ("GET", "/v1/items/1003/similar?filter=year", 422, 'filter: is "year"', "an object such as"),
    ("GET", "/v1/items/1003/similar?filter=[]", 422, 'filter: is "[]"', "an object such as"),
    ("GET", "/v1/items/1003/similar?filter=%7B%22a%22:1%7D", 422, "no attribute 'a'", "genres, year"),
    ("GET", "/v1/items/1003/similar?fields=" + "title," * 65, 422, "fields: has 65 entries", "at most 64"),
    ("GET", "/v1/items/1003/similar?filter=" + "%5B" * 9, 422, "filter: is", "an object such as"),
    (
        "GET",
        "/v1/items/1003/similar?filter=%7B%22year%22:" + "%5B" * 9 + "%5D" * 9 + "%7D",
        422,
        "filter: is nested more than 4 deep",
        "at most 4 levels",
    ),
    ("GET", "/v1/items/%00/similar", 404, "is not known", "catalogue"),
    ("GET", "/v1/items/" + "x" * 2000 + "/similar", 404, "is not known", "catalogue"),
    ("GET", "/v1/items//similar", 404, "item '' is not known", "catalogue"),
    ("GET", "/v1/retrieve/batch", 405, "Method Not Allowed", "POST /v1/retrieve/batch"),
    ("PUT", "/v1/retrieve", 405, "Method Not Allowed", "POST /v1/retrieve"),
    ("POST", "/readyz", 405, "Method Not Allowed", "GET /readyz"),
    ("GET", "/v1/generation/", 404, "Not Found", "GET /v1/generation"),
    ("GET", "/v1/items/1003", 404, "GET /v1/items/1003: Not Found", "POST /v1/retrieve"),
    ("GET", "/v2/retrieve", 404, "GET /v2/retrieve: Not Found", "POST /v1/retrieve"),
    ("GET", "/nothing", 404, "Not Found", "POST /v1/retrieve"),
    ("POST", "/", 405, "Method Not Allowed", "POST /v1/retrieve"),
    (
        "GET",
        "/demo/users?prefx=1",
        422,
        "prefx: there is no such key; did you mean 'prefix'?",
        "prefix, limit",
    ),
    ("GET", "/demo/users?prefix=1&prefix=2", 422, "prefix: is there twice", "once"),
    ("GET", "/demo/users?limit=0", 422, 'limit: is "0"', "an integer from 1 to 100"),
    ("GET", "/demo/users?limit=101", 422, 'limit: is "101"', "an integer from 1 to 100"),
    ("GET", "/demo/users?limit=%D9%A3", 422, "limit: is", "an integer from 1 to 100"),
    (
        "GET",
        "/demo/users?prefix=" + "x" * 1025,
        422,
        "prefix: has 1025 characters",
        "at most 1024 characters",
    ),
    ("GET", "/demo/users/nobody/history", 404, "user 'nobody' is not known", "a user with interactions"),
    ("GET", "/demo/users/a%2Fb/history", 404, "user 'a/b' is not known", "a user with interactions"),
    ("GET", "/demo/users/5/history?k=1", 422, "k: there is no such key", "no parameters"),
    ("GET", "/demo/users/" + "x" * 1025 + "/history", 422, "user_id: has 1025", "at most 1024 characters"),
    ("GET", "/demo/users/5", 404, "Not Found", "POST /v1/retrieve"),
    ("GET", "/demo/items", 422, "query: is missing", "text of 1 to 1024 characters"),
    ("GET", "/demo/items?query=%20", 422, "query: is missing", "text of 1 to 1024 characters"),
    ("GET", "/demo/items?query=x&limit=-1", 422, 'limit: is "-1"', "an integer from 1 to 100"),
    ("GET", "/demo/values?attribute=year", 422, "attribute: there is no such key", "no parameters"),
    ("GET", "/demo/..%2F..%2Fetc%2Fpasswd", 404, "Not Found", "POST /v1/retrieve"),
    ("GET", "/v1/retrieve", 405, "Method Not Allowed", "POST /v1/retrieve"),
    ("DELETE", "/v1/generation", 405, "Method Not Allowed", "GET /v1/generation"),
]


@pytest.mark.parametrize(("method", "path", "status", "message", "allowed"), PATHS, ids=range(len(PATHS)))
def test_paths_and_parameters(
    client: Client, shop: Shop, method: str, path: str, status: int, message: str, allowed: str
) -> None:
    check(client.send(method, path), shop, status, message, allowed)


HEADERS: list[tuple[dict[str, str], int, str, str]] = [
    ({"X-Deadline-Ms": "0"}, 422, 'X-Deadline-Ms: is "0"', "integer from 1 to 600000"),
    ({"X-Deadline-Ms": "1e3"}, 422, 'X-Deadline-Ms: is "1e3"', "integer from 1 to 600000"),
    ({"X-Deadline-Ms": "-5"}, 422, 'X-Deadline-Ms: is "-5"', "integer from 1 to 600000"),
    ({"X-Deadline-Ms": "600001"}, 422, 'X-Deadline-Ms: is "600001"', "integer from 1 to 600000"),
    ({"Content-Type": "text/plain"}, 415, 'Content-Type is "text/plain"', "application/json"),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "Content-Type is", "application/json"),
    ({"Content-Type": "application/json; charset=latin-1"}, 415, "charset=latin-1", "UTF-8"),
    ({"Content-Encoding": "gzip"}, 415, 'Content-Encoding is "gzip"', "identity"),
    ({"Content-Encoding": "br, identity"}, 415, "Content-Encoding is", "identity"),
]


@pytest.mark.parametrize(("headers", "status", "message", "allowed"), HEADERS, ids=range(len(HEADERS)))
def test_headers_that_are_not_allowed(
    client: Client, shop: Shop, headers: dict[str, str], status: int, message: str, allowed: str
) -> None:
    for path, body in (("/v1/retrieve", {"k": 5}), ("/v1/retrieve/batch", {"requests": [{"k": 5}]})):
        check(client.send("POST", path, body, headers), shop, status, message, allowed)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/json"},
        {"Content-Type": "Application/JSON; charset=UTF-8"},
        {"Content-Encoding": "identity", "X-Deadline-Ms": "600000"},
    ],
    ids=range(3),
)
def test_headers_that_are_allowed(client: Client, headers: dict[str, str]) -> None:
    assert client.send("POST", "/v1/retrieve", {"k": 5}, headers).status == 200


def test_every_problem_is_listed(client: Client) -> None:
    error = client.retrieve(k=0.5, user_id=True, history=[{"time": 1}], at="x").json["error"]
    assert [d["where"] for d in error["details"]] == [
        "k",
        "user_id",
        "history[0].item_id",
        "history[0].time",
        "at",
    ]


def test_the_service_still_answers(client: Client) -> None:
    assert len(client.items(user_id="1", k=5)) == 5
