"""Shard groups that are late or away: what a gateway waits for, for how long, and whom it blames."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.gateway import GatewayService, NoGroupError
from serve.hedging import Replicas
from serve.metrics import Metrics
from serve.schemas import BadRequest
from serve.service import to_json
from tests.shard_groups import LONG_S, SETTINGS, away, caller, gateway, held_by
from tests.shop import build_store
from tests.unit.test_serve_metrics import Collected
from twotower.config import Config
from twotower.errors import may_pass
from twotower.generations.generation import Generation
from twotower.retrieval.front import Front
from twotower.retrieval.groups import ShardGroup, answer, unpack_search
from twotower.retrieval.query import Answer, Query


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config, _, generation = build_store(tmp_path_factory.mktemp("groups"))
    return config, generation


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


def asked_canaries(service: GatewayService) -> None:
    """Ask canary queries as a gateway does: in a thread of its own, beside the event loop."""

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def wait(work: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result()

        await loop.run_in_executor(None, service.check_canaries, service.front, wait)

    asyncio.run(run())


def test_a_slow_generation_is_sound_and_a_late_group_says_nothing_about_it(
    shop: tuple[Config, Path],
) -> None:
    # All 32 vectors of a message together take several times the time of one.
    asked_canaries(slow_gateway(shop[1], 0.01, 0.1))
    late = slow_gateway(shop[1], 0.0, 0.1)
    late.groups[1]._replicas[0].ask = Slow(held_by(shop[1], 2)[1], 10.0)
    with pytest.raises(TimeoutError) as caught:
        asked_canaries(late)
    assert may_pass(caught.value)
    with pytest.raises(TimeoutError):
        asked_canaries(gateway(shop[1], [Replicas("group-0", [away]), Replicas("group-1", [away])]))


def test_a_group_that_is_late_once_is_asked_again(shop: tuple[Config, Path]) -> None:
    service = slow_gateway(shop[1], 0.0, 0.1)
    held = held_by(shop[1], 2)[1]
    asked: list[bytes] = []

    async def cold(message: bytes) -> bytes:
        asked.append(message)
        if len(asked) == 1:
            await asyncio.sleep(10)
        return answer(message, held)

    service.groups[1]._replicas[0].ask = cold
    asked_canaries(service)
    # All questions, not only those that had no answer yet.
    assert len(asked) > 10
