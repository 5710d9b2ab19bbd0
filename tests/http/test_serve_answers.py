"""What the service answers over HTTP, against the library and against the data."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest

from tests.service import Client, Shop
from tests.shop import NUM_ITEMS, NUM_OUTSIDE, NUM_USERS, title_of
from twotower.retrieval.retriever import HistoryItem, Query, Retriever
from twotower.schema import KINDS

USERS = [str(u) for u in range(0, NUM_USERS, 5)]
CATALOGUE = {str(1000 + i) for i in range(NUM_ITEMS)}


def iso(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat()


def log_of(shop: Shop, user_id: str) -> list[tuple[str, int, float, int]]:
    """Return a user's (item id, time, weight, kind), oldest first."""
    log = shop.dataset.interactions
    row = shop.dataset.user_ids.row(user_id)
    assert row is not None
    part = slice(log.user_offsets[row], log.user_offsets[row + 1])
    ids = shop.dataset.item_ids.ids(log.item_row[part])
    return list(
        zip(ids, log.time[part].tolist(), log.weight[part].tolist(), log.kind[part].tolist(), strict=True)
    )


def positives(shop: Shop, user_id: str) -> list[dict[str, Any]]:
    """Return a user's positive interactions as a request's history."""
    return [
        {"item_id": i, "time": iso(t), "weight": w}
        for i, t, w, kind in log_of(shop, user_id)
        if kind == KINDS["positive"]
    ]


QUERIES: list[tuple[dict[str, Any], Query]] = [
    *(({"user_id": u, "k": 13}, Query(user_id=u, k=13)) for u in USERS),
    (
        {"user_id": 10, "k": 4, "fields": ["title", "genres"]},
        Query(user_id="10", k=4, fields=["title", "genres"]),
    ),
    ({"user_id": "10", "k": 200, "exclude_seen": False}, Query(user_id="10", k=200, exclude_seen=False)),
    (
        {"k": 9, "history": [1003, "1007", {"item_id": 1012, "weight": 0.5}]},
        Query(k=9, history=[HistoryItem("1003"), HistoryItem("1007"), HistoryItem("1012", weight=0.5)]),
    ),
    ({"k": 6, "features": {"age": 44, "group": "red"}}, Query(k=6, features={"age": 44, "group": "red"})),
    (
        {"k": 8, "user_id": "7", "features": {"group": "blue"}},
        Query(k=8, user_id="7", features={"group": "blue"}),
    ),
    ({"k": 5}, Query(k=5)),
    (
        {"k": 7, "user_id": "nobody", "exclude_items": [1001, "1002"]},
        Query(k=7, user_id="nobody", exclude_items=["1001", "1002"]),
    ),
    (
        {"user_id": "5", "k": 9, "filter": {"genres": {"any_of": ["War"]}, "year": {"gte": 1960}}},
        Query(user_id="5", k=9, filter={"genres": {"any_of": ["War"]}, "year": {"gte": 1960}}),
    ),
    (
        {"k": 6, "filter": {"in_stock": {"any_of": [False]}}},
        Query(k=6, filter={"in_stock": {"any_of": [False]}}),
    ),
    (
        {"user_id": 7, "k": 9, "allow_items": [1004, 1009, 1012, 1020, 1033, 1041, 1050, "none"]},
        Query(user_id="7", k=9, allow_items=["1004", "1009", "1012", "1020", "1033", "1041", "1050", "none"]),
    ),
    (
        {"k": 12, "user_id": "5", "at": "2023-12-01T00:00:00"},
        Query(k=12, user_id="5", at=1_701_388_800_000_000),
    ),
]


@pytest.mark.parametrize(("body", "query"), QUERIES, ids=range(len(QUERIES)))
def test_the_answer_is_the_librarys(
    client: Client, library: Retriever, body: dict[str, Any], query: Query
) -> None:
    answer = client.retrieve(**body).json
    expected = library.retrieve(query)
    assert answer["items"] == expected.items
    assert answer["strategy"] == expected.strategy
    assert answer["generation"] == expected.generation == "g1"
    assert answer["partial"] is False
    assert answer["missing_groups"] == []
    assert len(answer["items"]) > 3
    assert set(answer["timing_ms"]) == {"encode", "search", "total"}
    assert answer["timing_ms"]["total"] >= answer["timing_ms"]["search"] >= 0


def test_a_batch_has_the_answers_of_its_requests(client: Client) -> None:
    bodies = [body for body, _ in QUERIES]
    assert len(bodies) > 15
    reply = client.send("POST", "/v1/retrieve/batch", {"requests": bodies})
    assert reply.status == 200, reply.content
    assert set(reply.json) == {"answers"}
    answers = reply.json["answers"]
    assert len(answers) == len(bodies)
    for body, answer in zip(bodies, answers, strict=True):
        single = client.retrieve(**body).json
        assert {name: answer[name] for name in ("generation", "strategy", "partial", "missing_groups")} == {
            name: single[name] for name in ("generation", "strategy", "partial", "missing_groups")
        }
        assert [i["score"] for i in answer["items"]] == pytest.approx(
            [i["score"] for i in single["items"]], abs=1e-6
        )
        assert [i["item_id"] for i in answer["items"]] == [i["item_id"] for i in single["items"]]
        assert [set(i) for i in answer["items"]] == [set(i) for i in single["items"]]
    assert len({json.dumps(answer["items"]) for answer in answers}) == len(bodies)


def test_as_many_requests_as_a_batch_may_hold(client: Client) -> None:
    requests = [{"user_id": str(user % NUM_USERS), "k": 1 + user % 5} for user in range(64)]
    reply = client.send("POST", "/v1/retrieve/batch", {"requests": requests})
    assert [len(answer["items"]) for answer in reply.json["answers"]] == [r["k"] for r in requests]


def test_a_body_of_a_mebibyte_of_ids(client: Client) -> None:
    ids = [f"no such item {n:020d}" for n in range(28_000)]
    body = json.dumps({"k": 5, "user_id": "1", "exclude_items": ids, "allow_items": None}).encode()
    assert 1_000_000 < len(body) <= 1 << 20
    reply = client.send("POST", "/v1/retrieve", body)
    assert reply.status == 200, reply.content[:500]
    assert reply.json["items"] == client.items(k=5, user_id="1")


def test_users_get_different_items_in_falling_order(client: Client) -> None:
    lists = [client.items(user_id=u, k=10) for u in USERS]
    for items in lists:
        scores = [i["score"] for i in items]
        assert scores == sorted(scores, reverse=True)
        assert len({i["item_id"] for i in items}) == 10
    assert len({tuple(i["item_id"] for i in items) for items in lists}) == len(USERS)


@pytest.mark.parametrize("user_id", USERS)
def test_nothing_he_has_had_is_recommended(client: Client, shop: Shop, user_id: str) -> None:
    had = {item for item, *_ in log_of(shop, user_id)}
    items = {i["item_id"] for i in client.items(user_id=user_id, k=200)}
    # All that is allowed comes back, and only that.
    assert items == CATALOGUE - had
    assert had & CATALOGUE
    assert {i["item_id"] for i in client.items(user_id=user_id, k=200, exclude_seen=False)} == CATALOGUE


def test_the_stored_history_sent_explicitly_gives_identical_scores(client: Client, shop: Shop) -> None:
    outside = 0
    for user_id in (str(u) for u in range(NUM_USERS)):
        history = positives(shop, user_id)
        assert len(history) > 3
        outside += sum(h["item_id"] not in CATALOGUE for h in history)
        assert client.items(user_id=user_id, k=30, history=history) == client.items(user_id=user_id, k=30)
    assert outside > NUM_OUTSIDE


def test_history_in_the_request_replaces_the_stored_one(client: Client) -> None:
    stored = client.items(user_id="5", k=200, exclude_seen=False)
    other = client.items(user_id="5", k=200, exclude_seen=False, history=["1001", "1002"])
    assert {i["item_id"] for i in stored} == {i["item_id"] for i in other}
    assert [i["score"] for i in stored] != [i["score"] for i in other]
    # Excluded is the union: what he has had, and what the request says.
    left = {i["item_id"] for i in client.items(user_id="5", k=200)}
    extra = sorted(left)[:2]
    assert {i["item_id"] for i in client.items(user_id="5", k=200, history=extra)} == left - set(extra)


def test_a_later_history_does_not_count_at_an_earlier_moment(client: Client, shop: Shop) -> None:
    history = positives(shop, "11")
    third = history[2]["time"]
    at_third = client.items(user_id="11", k=25, exclude_seen=False, history=history, at=third)
    first_two = client.items(user_id="11", k=25, exclude_seen=False, history=history[:2])
    first_three = client.items(user_id="11", k=25, exclude_seen=False, history=history[:3])
    assert at_third == first_two != first_three
    untimed = [{**h, "time": None} for h in history[:3]]
    assert client.items(user_id="11", k=25, exclude_seen=False, history=untimed, at=third) == first_three


def test_the_moment_limits_the_stored_history(client: Client, shop: Shop) -> None:
    history = positives(shop, "12")[-3:]
    at = history[-1]["time"]
    assert client.items(user_id="12", k=9, at=at) != client.items(user_id="12", k=9)
    nothing = client.items(user_id="12", k=9, at="2001-01-01")
    assert nothing == client.items(user_id="12", k=9, history=[])


@pytest.mark.parametrize(
    ("body", "strategy"),
    [
        ({"user_id": "3"}, "personal"),
        ({"user_id": "3", "history": []}, "personal"),
        ({"user_id": "stranger", "history": ["1001"]}, "history"),
        ({"history": [1000 + NUM_ITEMS]}, "history"),
        ({"history": ["no such item"], "features": {"age": 30}}, "features"),
        ({"user_id": "stranger", "features": {"group": "red"}}, "features"),
        ({"user_id": "stranger"}, "popular"),
        ({"history": ["no such item"]}, "popular"),
        ({"features": {"age": None}}, "popular"),
        ({}, "popular"),
    ],
)
def test_strategies(client: Client, body: dict[str, Any], strategy: str) -> None:
    reply = client.retrieve(k=5, **body)
    assert reply.status == 200
    assert reply.json["strategy"] == strategy
    assert len(reply.json["items"]) == 5


def test_popular_items_are_those_that_most_users_have_had(client: Client, shop: Shop) -> None:
    items = client.items(k=200)
    assert {i["item_id"] for i in items} == CATALOGUE
    log = shop.dataset.interactions
    counts: dict[str, int] = {}
    for row in log.item_row[log.kind == KINDS["positive"]].tolist():
        item = shop.dataset.item_ids.id(row)
        counts[item] = counts.get(item, 0) + 1
    ranked = [counts.get(i["item_id"], 0) for i in items]
    assert ranked == sorted(ranked, reverse=True)
    scores = [i["score"] for i in items]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[0] <= 1
    best = items[0]["item_id"]
    assert [i["item_id"] for i in client.items(k=3, exclude_items=[best])] == [
        i["item_id"] for i in items[1:4]
    ]


def test_fewer_than_k_only_where_fewer_are_allowed(client: Client) -> None:
    all_but_two = sorted(CATALOGUE)[2:]
    items = client.items(user_id="3", k=50, exclude_seen=False, exclude_items=all_but_two)
    assert {i["item_id"] for i in items} == set(sorted(CATALOGUE)[:2])
    assert client.items(user_id="3", k=50, exclude_items=sorted(CATALOGUE)) == []


def test_fields(client: Client) -> None:
    item = client.items(user_id="3", k=1, fields=["title", "year"])[0]
    number = int(item["item_id"]) - 1000
    assert item["title"] == title_of(number)
    assert isinstance(item["year"], int)
    assert list(item) == ["item_id", "score", "title", "year"]


def test_similar_items(client: Client, library: Retriever) -> None:
    reply = client.get("/v1/items/1003/similar?k=6&fields=title")
    assert reply.status == 200
    answer = reply.json
    assert answer["items"] == library.similar("1003", 6, ["title"]).items
    assert len(answer["items"]) == 6
    assert "1003" not in {i["item_id"] for i in answer["items"]}
    assert answer["strategy"] == "similar"
    assert len(client.get("/v1/items/1003/similar").json["items"]) == 20
    scores = [i["score"] for i in client.get("/v1/items/1003/similar?k=200").json["items"]]
    assert len(scores) == NUM_ITEMS - 1
    assert scores == sorted(scores, reverse=True)


def test_filtered_answers_satisfy_the_filter(client: Client) -> None:
    filtered = {"genres": {"any_of": ["War", "Drama"], "none_of": ["Comedy"]}, "year": {"gte": 1970}}
    items = client.items(user_id="5", k=200, exclude_seen=False, filter=filtered, fields=["genres", "year"])
    every = client.items(user_id="5", k=200, exclude_seen=False, fields=["genres", "year"])

    def satisfies(item: dict[str, Any]) -> bool:
        genres = set(item["genres"].split("|"))
        return bool({"War", "Drama"} & genres) and "Comedy" not in genres and item["year"] >= 1970

    assert [i["item_id"] for i in items] == [i["item_id"] for i in every if satisfies(i)]
    assert 5 < len(items) < len(every) - 5
    path = "/v1/items/1003/similar?k=200&filter=" + quote(json.dumps(filtered))
    similar = {item["item_id"] for item in client.get(path).json["items"]}
    assert similar == {item["item_id"] for item in items} - {"1003"}


def test_generation_health_and_docs(client: Client, shop: Shop) -> None:
    facts = client.get("/v1/generation").json
    assert facts["id"] == "g1"
    assert facts["num_items"] == NUM_ITEMS
    assert facts["num_users"] == NUM_USERS
    assert facts["user_columns"] == ["age", "group"]
    assert set(facts["item_fields"]) >= {"title", "genres", "year"}
    assert facts["index"]["index_recall"] == 1.0
    assert facts["attributes"]["genres"] == {"type": "list", "operators": ["any_of", "all_of", "none_of"]}
    assert str(shop.generation.parent) not in client.get("/v1/generation").content.decode()
    assert client.get("/healthz").json == {"status": "ok"}
    ready = client.get("/readyz").json
    assert ready["status"] == "ready"
    assert ready["generation"] == "g1"
    assert ready["settings"]["active"]["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert ready["settings"]["active"]["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert ready["settings"]["missing"] == {}
    assert client.get("/docs").status == 200
    document = client.get("/openapi.json").json
    assert set(document["paths"]) == {
        "/v1/retrieve",
        "/v1/retrieve/batch",
        "/v1/items/{item_id}/similar",
        "/v1/generation",
        "/healthz",
        "/readyz",
    }


def test_request_ids_are_echoed_or_made(client: Client) -> None:
    assert client.get("/healthz", **{"X-Request-ID": "abc-123"}).headers["x-request-id"] == "abc-123"
    made = {client.retrieve(k=1).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    refused = client.send("POST", "/v1/retrieve", b"{", {"X-Request-ID": "abc-124"})
    assert (refused.status, refused.headers["x-request-id"]) == (400, "abc-124")
    assert refused.names.count("x-request-id") == 1
