"""Groups of shards behind a gateway, in one process: the answers of a retriever over all shards."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest

from serve.gateway import NoGroupError
from serve.hedging import Replicas
from tests.shard_groups import away, caller, gateway, held_by, whole
from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from tests.unit.test_retriever_filters import FILTERS
from tests.updates import copied, table_of
from twotower.config import Config
from twotower.errors import ArtefactError, NotAllowedError, RequestError
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.index.hits import Hits
from twotower.lifecycle.update import update_items
from twotower.retrieval.groups import (
    GroupQuery,
    answer,
    merge_groups,
    pack_hits,
    pack_search,
    unpack_hits,
    unpack_search,
)
from twotower.retrieval.query import HistoryItem, Query, UnknownItemError
from twotower.retrieval.retriever import Retriever
from twotower.schema import MAX_WEIGHT

QUERIES = [
    *(Query(k=9, user_id=str(u)) for u in range(NUM_USERS)),
    Query(k=200, user_id="3", exclude_seen=False),
    Query(k=7),
    Query(k=NUM_ITEMS, filter={"genres": {"any_of": ["War"]}}),
    Query(k=5, history=[HistoryItem("1003"), HistoryItem("1007", weight=0.5)], fields=["title", "genres"]),
    Query(k=6, user_id="5", exclude_items=["1001", "1002", "nothing"]),
    Query(k=6, user_id="5", allow_items=["1004", "1009", "1012", "1020", "nothing"]),
    Query(k=6, user_id="5", allow_items=[]),
    Query(k=6, user_id="6", allow_items=["1004", "1009"], filter={"year": {"gte": 1900}}),
    *(Query(k=11, user_id="8", filter=filter) for filter, _ in FILTERS),
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config, _, generation = build_store(tmp_path_factory.mktemp("groups"))
    return config, generation


@pytest.fixture(scope="module")
def updated(shop: tuple[Config, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generation with a delta and tombstones."""
    config = copied(shop[0], tmp_path_factory.mktemp("updated"))
    store = Store(config.store)
    items = Generation.open(shop[1]).items.table(np.arange(4)).to_pylist()
    changed = [{**items[0], "title": "changed"}, {**items[1], "item_id": "new", "title": "new"}]
    result = update_items(store, table_of(changed, store.path("g1")), ["1005"], force=True)
    return store.path(result.generation)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("which", ["built", "updated"])
def test_the_answers_are_those_of_one_retriever(
    shop: tuple[Config, Path], updated: Path, num_groups: int, which: str
) -> None:
    generation = shop[1] if which == "built" else updated
    retriever = Retriever.open(generation)
    expected = [retriever.retrieve(query) for query in QUERIES]
    service = whole(generation, num_groups)
    alone = [asyncio.run(service.answers(service.front, [query]))[0] for query in QUERIES]
    for found in (alone, asyncio.run(service.answers(service.front, QUERIES))):
        assert [a.strategy for a in found] == [a.strategy for a in expected]
        for one, other in zip(found, expected, strict=True):
            assert [i["item_id"] for i in one.items] == [i["item_id"] for i in other.items]
            assert [i.get("title") for i in one.items] == [i.get("title") for i in other.items]
            np.testing.assert_allclose(
                [i["score"] for i in one.items], [i["score"] for i in other.items], atol=1e-6
            )
            assert one.missing_groups == ()
    assert {a.strategy for a in expected} == {"personal", "history", "popular"}
    assert len({tuple(i["item_id"] for i in a.items) for a in expected}) > NUM_USERS


@pytest.mark.parametrize("which", ["built", "updated"])
def test_similar_items_are_those_of_one_retriever(
    shop: tuple[Config, Path], updated: Path, which: str
) -> None:
    generation = shop[1] if which == "built" else updated
    retriever = Retriever.open(generation)
    service = whole(generation, 2)
    filter = {"genres": {"any_of": ["Drama"]}}
    for item in ["1000", "1001", "1030", *(["new"] if which == "updated" else [])]:
        for predicates in (None, filter):
            found = json.loads(asyncio.run(service.similar(item, 8, ["title"], predicates)))
            expected = retriever.similar(item, 8, ["title"], predicates)
            assert [i["item_id"] for i in found["items"]] == [i["item_id"] for i in expected.items]
            assert [i["title"] for i in found["items"]] == [i["title"] for i in expected.items]
            assert (found["strategy"], found["partial"]) == ("similar", False)
            assert len(found["items"]) > 2
    gone = "1005" if which == "updated" else "1060"
    with pytest.raises(UnknownItemError, match="is not in the catalogue"):
        asyncio.run(service.similar(gone, 8, [], None))


def test_a_group_that_is_away_is_named_and_the_rest_is_right(shop: tuple[Config, Path]) -> None:
    first, second = held_by(shop[1], 2)
    service = gateway(shop[1], [Replicas("group-0", [caller(first)]), Replicas("group-1", [away])])
    generation = Generation.open(shop[1])
    theirs = set()
    for name in generation.shard_groups(2)[0]:
        rows = np.load(shop[1] / "shards" / name / "item_rows.npy")
        theirs |= set(generation.item_ids.ids(rows))
    assert 10 < len(theirs) < NUM_ITEMS
    query = Query(k=NUM_ITEMS, user_id="4", exclude_seen=False)
    expected = [i for i in Retriever.open(shop[1]).retrieve(query).items if i["item_id"] in theirs]
    found = json.loads(asyncio.run(service.retrieve(query)))
    assert [i["item_id"] for i in found["items"]] == [i["item_id"] for i in expected]
    assert (found["partial"], found["missing_groups"]) == (True, ["group-1"])
    # Popularity is the gateway's own.
    popular = json.loads(asyncio.run(service.retrieve(Query(k=5))))
    assert (popular["partial"], popular["missing_groups"], len(popular["items"])) == (False, [], 5)
    # Of a mixed batch only what was searched is partial.
    mixed = asyncio.run(service.answers(service.front, [Query(k=5), query]))
    assert [a.missing_groups for a in mixed] == [(), ("group-1",)]
    assert second


def test_without_any_group_there_is_no_answer(shop: tuple[Config, Path]) -> None:
    service = gateway(shop[1], [Replicas("group-0", [away]), Replicas("group-1", [away])])
    with pytest.raises(NoGroupError, match="no part of the index answered"):
        asyncio.run(service.retrieve(Query(k=5, user_id="1")))
    with pytest.raises(NoGroupError, match="the part of the index that holds the item did not"):
        asyncio.run(service.similar("1001", 5, [], None))


@pytest.mark.parametrize(
    "query",
    [
        Query(k=5, user_id="1", filter={"colour": {"any_of": ["x"]}}),
        Query(k=5, filter={"year": {"near": 1}}),
        Query(k=0, user_id="1"),
        Query(k=5, fields=["colour"]),
        Query(k=5, user_id="1", features={"shoe": 1}),
    ],
)
def test_what_is_not_allowed_is_refused_by_the_gateway(shop: tuple[Config, Path], query: Query) -> None:
    groups = [Replicas("group-0", [away])]
    with pytest.raises(NotAllowedError):
        asyncio.run(gateway(shop[1], groups).retrieve(query))
    assert groups[0].counts.calls == 0


@pytest.mark.parametrize("weight", [1e300, -1e16, math.nan])
def test_a_weight_that_no_tower_can_take_is_refused(shop: tuple[Config, Path], weight: float) -> None:
    service = whole(shop[1], 2)
    bad = Query(k=5, user_id="1", history=[HistoryItem("1001", weight=weight)])
    with pytest.raises(NotAllowedError, match="history: a weight is too large; allowed: -1e"):
        Retriever.open(shop[1]).retrieve(bad)
    # Of a batch it is named.
    with pytest.raises(NotAllowedError, match=r"requests\[1\]: history: a weight is too large"):
        asyncio.run(service.retrieve_batch([Query(k=5, user_id="2"), bad]))
    large = Query(k=5, user_id="1", history=[HistoryItem(f"100{i}", weight=MAX_WEIGHT) for i in range(3)])
    assert np.linalg.norm(service.front.encode([large]).vectors) == pytest.approx(1, abs=1e-5)


def test_a_vector_of_nan_is_no_query_and_takes_no_group_out(
    shop: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = whole(shop[1], 2)
    query = Query(k=5, user_id="2")
    encode = service.front._model.encode_queries
    monkeypatch.setattr(service.front._model, "encode_queries", lambda batch: encode(batch) * math.nan)
    with pytest.raises(NotAllowedError, match="a number too large to encode"):
        asyncio.run(service.retrieve(query))
    monkeypatch.undo()
    # A group that is asked all the same goes on with others.
    nan = np.full((1, service.front.generation.manifest["embedding_dim"]), math.nan, np.float32)
    message = pack_search("g1", nan, [GroupQuery(3, np.zeros(0, np.int64))])
    with pytest.raises(RequestError):
        answer(message, held_by(shop[1], 1)[0])
    assert not json.loads(asyncio.run(service.retrieve(query)))["partial"]


def test_another_generation_is_never_mixed_in(shop: tuple[Config, Path], tmp_path: Path) -> None:
    held = held_by(shop[1], 1)[0]
    message = pack_search("g2", np.zeros((1, 11), np.float32), [GroupQuery(3, np.zeros(0, np.int64))])
    assert answer(message, held) == b""
    assert answer(message, {"g2": held["g1"]}) != b""
    wrong = pack_hits("g2", [Hits(np.array([1]), np.array([0.5], np.float32))])
    with pytest.raises(RequestError, match="answered from g2, g1 was asked"):
        unpack_hits(wrong, "g1")


def test_groups_hold_about_as_many_items_and_every_shard_once(shop: tuple[Config, Path]) -> None:
    generation = Generation.open(shop[1])
    for num_groups in (1, 2, 3):
        groups = generation.shard_groups(num_groups)
        assert sorted(n for names in groups for n in names) == sorted(generation.shard_names)
        assert all(groups)
    with pytest.raises(ArtefactError, match=r"3 shards, too few for 4 groups; build .*num_shards=4"):
        generation.shard_groups(4)


def test_messages_arrive_as_they_were(rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(3, 5)).astype(np.float32)
    queries = [
        GroupQuery(7, np.array([5, 9, 2]), {"genres": {"any_of": ["Ä", "x"]}}, None),
        GroupQuery(1, np.zeros(0, np.int64), None, np.array([3])),
        GroupQuery(1000, np.array([1]), None, np.zeros(0, np.int64)),
    ]
    name, got_vectors, got = unpack_search(pack_search("gen-1", vectors, queries))
    assert name == "gen-1"
    np.testing.assert_array_equal(got_vectors, vectors)
    for one, other in zip(got, queries, strict=True):
        assert (one.k, one.filter) == (other.k, other.filter)
        np.testing.assert_array_equal(one.excluded, other.excluded)
        assert (one.allowed_rows is None) == (other.allowed_rows is None)
        if other.allowed_rows is not None:
            np.testing.assert_array_equal(one.allowed_rows, other.allowed_rows)
    hits = [
        Hits(np.array([4, 1]), np.array([0.5, -1.0], np.float32)),
        Hits(np.zeros(0, np.int64), vectors[0, :0]),
    ]
    found = unpack_hits(pack_hits("g", hits), "g")
    for one, other in zip(found, hits, strict=True):
        np.testing.assert_array_equal(one.item_rows, other.item_rows)
        np.testing.assert_array_equal(one.scores, other.scores)


def test_merging_orders_by_score_then_by_row() -> None:
    first = Hits(np.array([7, 3]), np.array([0.9, 0.5], np.float32))
    second = Hits(np.array([2, 8]), np.array([0.5, 0.1], np.float32))
    merged = merge_groups([first, second], 3)
    assert merged.item_rows.tolist() == [7, 2, 3]
    np.testing.assert_allclose(merged.scores, [0.9, 0.5, 0.5])
    assert merge_groups([], 3).item_rows.tolist() == []
