"""Groups of shards behind a gateway, in one process: the answers of a retriever over all shards."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.gateway import GatewayService, NoGroupError
from serve.hedging import Replicas
from serve.metrics import Metrics
from serve.schemas import BadRequest
from serve.service import to_json
from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from tests.unit.test_retriever_filters import FILTERS
from tests.unit.test_serve_metrics import Collected
from tests.updates import copied, table_of
from twotower.config import Config
from twotower.errors import ArtefactError, NotAllowedError, RequestError, may_pass
from twotower.index.hits import Hits
from twotower.retrieval.front import Front
from twotower.retrieval.generation import Generation
from twotower.retrieval.groups import (
    GroupQuery,
    ShardGroup,
    answer,
    merge_groups,
    pack_hits,
    pack_search,
    unpack_hits,
    unpack_search,
)
from twotower.retrieval.query import MAX_WEIGHT, Answer, HistoryItem, Query, UnknownItemError
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.store import Store
from twotower.retrieval.update import update_items

LONG_S = 30.0
SETTINGS: dict[str, dict[str, str]] = {"active": {}, "missing": {}}
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


def held_by(generation: Path, num_groups: int) -> list[dict[str, ShardGroup]]:
    opened = Generation.open(generation)
    return [{opened.id: ShardGroup(opened, names)} for names in opened.shard_groups(num_groups)]


def caller(held: dict[str, ShardGroup]) -> Callable[[bytes], Awaitable[bytes]]:
    async def call(message: bytes) -> bytes:
        return answer(message, held)

    return call


async def away(message: bytes) -> bytes:
    raise ConnectionResetError


def gateway(generation: Path, groups: list[Replicas]) -> GatewayService:
    front = Front(Generation.open(generation))
    return GatewayService(front, groups, 1000, 1, SETTINGS, deadline_s=5.0)


def whole(generation: Path, num_groups: int) -> GatewayService:
    groups = [Replicas(f"group-{g}", [caller(h)]) for g, h in enumerate(held_by(generation, num_groups))]
    return gateway(generation, groups)


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


def is_vector_request(message: bytes) -> bool:
    return b'"item_row"' in message[:200]


class Slow:
    """A group that takes some time for each query, one after the other."""

    def __init__(self, held: dict[str, ShardGroup], each_s: float) -> None:
        self.held = held
        self.each_s = each_s

    async def __call__(self, message: bytes) -> bytes:
        found = answer(message, self.held)
        count = 1 if is_vector_request(message) else len(unpack_search(message)[2])
        await asyncio.sleep(self.each_s * count)
        return found


def slow_gateway(generation: Path, each_s: float, deadline_s: float) -> GatewayService:
    calls = [Slow(held, each_s) for held in held_by(generation, 2)]
    groups = [Replicas(f"group-{g}", [call]) for g, call in enumerate(calls)]
    front = Front(Generation.open(generation))
    return GatewayService(front, groups, 1000, 1, SETTINGS, deadline_s=deadline_s)


def test_the_time_of_a_group_is_that_of_each_query(shop: tuple[Config, Path]) -> None:
    # Eight queries take longer than the time of one.
    service = slow_gateway(shop[1], 0.05, 0.2)
    queries = [Query(k=5, user_id=str(u)) for u in range(8)]
    answers = asyncio.run(service.answers(service.front, queries))
    assert [a.missing_groups for a in answers] == [()] * 8


def test_a_group_is_not_waited_for_longer_than_the_client_waits(shop: tuple[Config, Path]) -> None:
    service = slow_gateway(shop[1], 0.5, 30.0)
    service.groups[0]._replicas[0].ask = caller(held_by(shop[1], 2)[0])

    async def run() -> None:
        begin = time.monotonic()
        query = Query(k=5, user_id="1")
        found = json.loads(await service.retrieve(query, deadline=begin + 0.1))
        assert found["missing_groups"] == ["group-1"]
        assert time.monotonic() - begin < 0.5
        # The time was short: nobody is left alone for it.
        assert not json.loads(await service.retrieve(query))["partial"]
        for late in (service.retrieve(query, begin), service.similar("1001", 5, [], None, begin)):
            with pytest.raises(BadRequest) as caught:
                await late
            assert caught.value.status == 504

    asyncio.run(run())


def test_a_client_with_too_little_time_is_told_so_and_no_group_is_blamed(shop: tuple[Config, Path]) -> None:
    # A query has its time in a group and a batch has not, each in less than the group is given.
    service = slow_gateway(shop[1], 0.1, 0.25)
    query = Query(k=5, user_id="1")

    async def run() -> None:
        for late in (
            lambda deadline: service.retrieve(query, deadline),
            lambda deadline: service.similar("1001", 5, [], None, deadline),
            lambda deadline: service.retrieve_batch([query] * 8, deadline + 0.4),
        ):
            with pytest.raises(BadRequest) as caught:
                await late(time.monotonic() + 0.05)
            assert (caught.value.status, caught.value.headers) == (504, {})
            assert caught.value.content["error"]["code"] == "deadline_exceeded"
        assert [group.counts.failures for group in service.groups] == [0, 0]
        assert not json.loads(await service.retrieve(query))["partial"]

    asyncio.run(run())


def test_what_groups_fail_in_is_not_the_clients_time(shop: tuple[Config, Path]) -> None:
    query = Query(k=5, user_id="1")

    async def missing(service: GatewayService, wait_s: float) -> list[Exception]:
        found = []
        for call in (
            lambda deadline: service.retrieve(query, deadline),
            lambda deadline: service.similar("1001", 5, [], None, deadline),
        ):
            with pytest.raises((NoGroupError, BadRequest)) as caught:
                await call(time.monotonic() + wait_s)
            found.append(caught.value)
        return found

    # The groups' own time is the shorter one; they are away; they do not hold the generation.
    slow = slow_gateway(shop[1], 10.0, 0.05)
    gone = gateway(shop[1], [Replicas(f"group-{g}", [away]) for g in range(2)])
    other = gateway(shop[1], [Replicas(f"group-{g}", [caller({})]) for g in range(2)])
    for service, wait_s in ((slow, 30.0), (gone, 3.0), (other, 3.0)):
        for error in asyncio.run(missing(service, wait_s)):
            assert isinstance(error, NoGroupError)
    # With more time one of these would have answered.
    mixed = slow_gateway(shop[1], 0.5, 30.0)
    mixed.groups[0]._replicas[0].ask = away
    for error in asyncio.run(missing(mixed, 0.1)):
        assert isinstance(error, BadRequest)


def test_json_is_made_where_the_items_are_described_and_counted_once(
    shop: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Collected()
    groups = [Replicas(f"group-{g}", [caller(held)]) for g, held in enumerate(held_by(shop[1], 2))]
    front = Front(Generation.open(shop[1]))
    service = GatewayService(front, groups, 1000, 1, SETTINGS, deadline_s=5.0, metrics=Metrics(sink))
    in_loop: list[bool] = []

    def noting(answer: Answer) -> bytes:
        in_loop.append(threading.current_thread() is threading.main_thread())
        return to_json(answer)

    monkeypatch.setattr("serve.service.to_json", noting)

    async def where(call: Awaitable[bytes]) -> list[bool]:
        in_loop.clear()
        assert json.loads(await call)
        return [*in_loop]

    async def run() -> None:
        short, long = Query(k=5, user_id="1"), Query(k=500, user_id="1", fields=["title"])
        for usual_ms in (math.inf, 0.0):
            front._usual_ms = usual_ms
            assert await where(service.retrieve_batch([short, Query(k=5)])) == [False, False]
            assert await where(service.retrieve(long)) == [False]
            assert await where(service.similar("1001", 5, ["title"], None)) == [False]
            # What is short takes less time in the loop than a thread takes to begin.
            assert await where(service.retrieve(short)) == [usual_ms == 0]

    asyncio.run(run())
    service.close()
    assert sink.counter("twotower_answers") == {("personal",): 6, ("popular",): 2, ("similar",): 2}


@pytest.mark.parametrize("stalled", [0, 1])
def test_the_first_group_that_has_the_vector_of_an_item_is_enough(
    shop: tuple[Config, Path], stalled: int
) -> None:
    held = held_by(shop[1], 2)
    service = gateway(shop[1], [Replicas(f"group-{g}", [caller(h)]) for g, h in enumerate(held)])
    front, stalling = service.front, service.groups[stalled]
    taken_back = 0

    async def stall(message: bytes) -> bytes:
        nonlocal taken_back
        if is_vector_request(message):
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                taken_back += 1
                raise
        return answer(message, held[stalled])

    stalling._replicas[0].ask = stall

    def has(group: int, row: int) -> bool:
        return held[group]["g1"].vector(row) is not None

    rows = [front.row_of(str(1000 + i)) for i in range(40)]
    there = next(row for row in rows if has(1 - stalled, row))
    theirs = next(row for row in rows if has(stalled, row))

    async def run() -> None:
        vector = await asyncio.wait_for(service._vector(front, there), 2.0)
        np.testing.assert_array_equal(vector, held[1 - stalled]["g1"].vector(there))
        # What nobody waits for any more is neither left running nor held against the replica.
        await asyncio.sleep(0)
        assert taken_back == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert stalling._replicas[0].num_running == 0
        item_id = front.generation.item_ids.id(there)
        found = json.loads(await asyncio.wait_for(service.similar(item_id, 5, [], None), 2.0))
        assert (found["partial"], len(found["items"])) == (False, 5)
        assert stalling.counts.failures == 0
        # A group that says nothing may be the one that has it.
        service._deadline_s = 0.05
        with pytest.raises(NoGroupError):
            await service._vector(front, theirs)
        assert stalling.counts.failures == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}
        stalling._replicas[0].paused_until = 0.0
        # Nor does a client that goes away leave calls behind.
        service._deadline_s = 5.0
        gone = asyncio.ensure_future(service._vector(front, theirs))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert stalling._replicas[0].num_running == 0

    asyncio.run(run())


def probed(service: GatewayService) -> None:
    """Probe as a gateway does: in a thread of its own, beside the event loop."""

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def wait(work: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result()

        await loop.run_in_executor(None, service.probe, service.front, wait)

    asyncio.run(run())


def test_a_slow_generation_is_probed_and_a_late_group_says_nothing_about_it(
    shop: tuple[Config, Path],
) -> None:
    # All 32 vectors of a message together take several times the time of one.
    probed(slow_gateway(shop[1], 0.01, 0.1))
    late = slow_gateway(shop[1], 0.0, 0.1)
    late.groups[1]._replicas[0].ask = Slow(held_by(shop[1], 2)[1], 10.0)
    with pytest.raises(TimeoutError) as caught:
        probed(late)
    assert may_pass(caught.value)
    with pytest.raises(TimeoutError):
        probed(gateway(shop[1], [Replicas("group-0", [away]), Replicas("group-1", [away])]))


def test_a_group_that_is_late_once_is_probed_again(shop: tuple[Config, Path]) -> None:
    service = slow_gateway(shop[1], 0.0, 0.1)
    held = held_by(shop[1], 2)[1]
    asked: list[bytes] = []

    async def cold(message: bytes) -> bytes:
        asked.append(message)
        if len(asked) == 1:
            await asyncio.sleep(10)
        return answer(message, held)

    service.groups[1]._replicas[0].ask = cold
    probed(service)
    # All questions, not only those that had no answer yet.
    assert len(asked) > 10


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
