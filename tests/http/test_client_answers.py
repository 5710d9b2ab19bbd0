"""The Python client against the real service: its answers are the library's."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from tests.http.conftest import Client as RawClient
from tests.http.conftest import Shop
from twotower.client import Answer, Client, ServiceError
from twotower.retrieval.query import Answer as LibraryAnswer
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever

AT = datetime(2026, 1, 31, 10, tzinfo=UTC)


@pytest.fixture(scope="module")
def python_client(client: RawClient) -> Iterator[Client]:
    with Client(client.url, timeout_s=30) as opened:
        yield opened


def same(answer: Answer, known: LibraryAnswer) -> bool:
    """Whether an answer over HTTP is that of the library, timings and the last bits of scores apart."""
    fields = [{n: v for n, v in item.items() if n not in ("item_id", "score")} for item in known.items]
    assert [item.score for item in answer.items] == pytest.approx([i["score"] for i in known.items], abs=1e-6)
    return (
        [item.item_id for item in answer.items] == [i["item_id"] for i in known.items]
        and [item.fields for item in answer.items] == fields
        and (answer.generation, answer.strategy) == (known.generation, known.strategy)
        and not answer.partial
        and answer.timing_ms["total"] > 0
    )


def test_a_known_user(python_client, library):
    answer = python_client.retrieve(user_id=10, k=4, fields=["title", "genres"], request_id="this one")
    assert len(answer.items) == 4
    assert same(answer, library.retrieve(Query(user_id="10", k=4, fields=["title", "genres"])))
    assert answer.request_id == "this one"


def test_everything_that_a_request_may_hold(python_client, library):
    answer = python_client.retrieve(
        k=9,
        history=["1003", {"item_id": 1012, "time": AT, "weight": 0.5}],
        features={"age": 44},
        at=AT.replace(year=2027),
        exclude_seen=False,
        exclude_items=[1004],
        filter={"year": {"gte": 1960}},
    )
    moment = int(AT.timestamp() * 1e6)
    query = Query(
        k=9,
        history=[HistoryItem("1003"), HistoryItem("1012", moment, 0.5)],
        features={"age": 44},
        at=int(AT.replace(year=2027).timestamp() * 1e6),
        exclude_seen=False,
        exclude_items=["1004"],
        filter={"year": {"gte": 1960}},
    )
    assert same(answer, library.retrieve(query))
    assert answer.strategy == "history"


def test_similar_items(python_client, library):
    answer = python_client.similar(1007, k=5, fields=["title", "year"], filter={"year": {"gte": 1960}})
    assert len(answer.items) == 5
    assert same(answer, library.similar("1007", 5, ["title", "year"], {"year": {"gte": 1960}}))


def test_the_generation_and_readiness(python_client: Client, shop: Shop, library: Retriever):
    assert python_client.generation()["id"] == "g1"
    assert python_client.generation()["num_items"] == library.describe()["num_items"]
    assert python_client.ready() is True


def test_refusals_say_what_is_allowed(python_client):
    with pytest.raises(ServiceError) as raised:
        python_client.retrieve(k=0, user_id="1")
    assert (raised.value.status, raised.value.code) == (422, "invalid_request")
    assert raised.value.allowed == "an integer from 1 to 200"
    assert [detail["where"] for detail in raised.value.details] == ["k"]
    with pytest.raises(ServiceError, match="404 unknown_item: item 'no such' is not known"):
        python_client.similar("no such")
