"""Index recall on live traffic behind a gateway: exact search in the groups, aside of their queries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.gateway import GatewayService
from serve.hedging import GroupUnavailableError, Replicas
from serve.metrics import Metrics
from tests.shard_groups import SETTINGS, away, caller, held_by
from tests.shop import NUM_ITEMS, build_store
from tests.unit.test_serve_metrics import Collected
from tests.unit.test_shard_groups import QUERIES
from twotower.generations.generation import Generation
from twotower.index.search import Searcher
from twotower.retrieval.front import Front
from twotower.retrieval.groups import is_exact
from twotower.retrieval.query import Answer, Query
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(tmp_path_factory.mktemp("store"))[2]


class Groups:
    """Two groups in this process, and what each was asked."""

    def __init__(self, generation: Path) -> None:
        self.messages: list[bytes] = []
        self.replicas = [
            Replicas(f"group-{g}", [self._noting(caller(held))])
            for g, held in enumerate(held_by(generation, 2))
        ]

    def _noting(self, call):
        async def noting(message: bytes) -> bytes:
            self.messages.append(message)
            return await call(message)

        return noting


def gateway(generation: Path, groups: Sequence[Replicas], sink: Collected, every: int) -> GatewayService:
    front = Front(Generation.open(generation))
    metrics = Metrics(sink, flush_s=0.01)
    return GatewayService(
        front, groups, 1000, 1, SETTINGS, deadline_s=5.0, metrics=metrics, probe_every=every
    )


def test_index_recall_is_that_of_one_retriever_and_by_exact_search(
    generation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = Retriever.open(generation)
    everything = [str(1000 + i) for i in range(NUM_ITEMS)]
    cases = []
    for query in QUERIES:
        ids = [item["item_id"] for item in retriever.retrieve(query).items]
        worse = ids[::2] + [i for i in everything if i not in ids][: len(ids) // 2]
        for answered in (ids, worse):
            cases.append((query, answered, retriever.index_recall(query, answered)))
    groups = Groups(generation)
    service = gateway(generation, groups.replicas, Collected(), 0)

    def never(*arguments: object) -> None:
        raise AssertionError("an index was asked")

    async def main() -> list[float | None]:
        loop = asyncio.get_running_loop()
        service._loop = loop
        found = []
        for query, answered, _ in cases:
            ask = service._index_recall, service.front, query, answered
            found.append(await loop.run_in_executor(None, *ask))
        return found

    monkeypatch.setattr(Searcher, "search", never)
    found = asyncio.run(main())
    service.close()
    expected = [recall for _, _, recall in cases]
    assert found == pytest.approx(expected)
    assert all(map(is_exact, groups.messages))
    assert {1.0, None} < set(expected)
    assert min(r for r in expected if r is not None) < 0.9


def test_every_nth_whole_answer_is_probed(generation: Path) -> None:
    sink = Collected()
    groups = Groups(generation)
    service = gateway(generation, groups.replicas, sink, 3)

    async def main() -> None:
        for user in range(6):
            await service.retrieve(Query(k=5, user_id=str(user)))
            while sink.total("twotower_probes") < (user + 1) // 3:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))
    service.close()
    exact = sum(map(is_exact, groups.messages))
    assert (exact, len(groups.messages) - exact) == (2 * 2, 6 * 2)
    assert {value for name, value, _ in sink.values if name == "twotower_index_recall"} == {1.0}
    # Exact search says nothing about how long a query takes, or how the replicas do.
    assert [group.counts.calls for group in groups.replicas] == [6, 6]


def test_a_partial_answer_is_not_probed(generation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[Answer] = []
    whole = Groups(generation).replicas
    for groups in ([whole[0], Replicas("group-1", [away])], whole):
        service = gateway(generation, groups, Collected(), 1)
        monkeypatch.setattr(service._probe, "offer", lambda front, query, answer: offered.append(answer))
        answer = json.loads(asyncio.run(service.retrieve(Query(k=5, user_id="3"))))
        service.close()
        assert answer["partial"] == (groups is not whole)
        assert len(offered) == (groups is whole)


def test_a_group_that_can_not_be_asked() -> None:
    async def forgot(message: bytes) -> bytes:
        return b""

    async def never(message: bytes) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        for call in (away, forgot, never):
            with pytest.raises(GroupUnavailableError, match="the group"):
                await Replicas("the group", [call]).call_aside(b"x", 0.1)

    asyncio.run(main())
