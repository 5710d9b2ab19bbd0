"""What the service counts and measures, without Ray, and the probe of index recall."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import prometheus_client
import pytest

from serve.api import make_api
from serve.fused import FusedService
from serve.metrics import BUCKETS_MS, SPECS, Metrics
from serve.probe import Probe
from tests.shop import NUM_ITEMS, build_store
from twotower.retrieval.query import Answer, HistoryItem, Query
from twotower.retrieval.retriever import Retriever


class Collected:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float, dict[str, str]]] = []

    def record(self, name: str, value: float, tags: dict[str, str]) -> None:
        base, _, part = name.rpartition("_")
        if name in SPECS:
            assert SPECS[name].kind != "histogram"
            assert tuple(tags) == SPECS[name].tags
        else:
            assert SPECS[base].kind == "histogram"
            assert tuple(tags) == SPECS[base].tags + (("le",) if part == "bucket" else ())
        self.values.append((name, value, tags))

    def total(self, name: str, **tags: str) -> float:
        """Return the sum of a counter."""
        return sum(value for n, value, t in self.values if n == name and tags.items() <= t.items())

    def latest(self, name: str, **tags: str) -> float:
        """Return the sum of the latest values of a gauge with these tags."""
        found = {tuple(t.items()): v for n, v, t in self.values if n == name and tags.items() <= t.items()}
        return sum(found.values())

    def counter(self, name: str) -> dict[tuple[str, ...], float]:
        """Return a counter by the values of its tags."""
        sums: dict[tuple[str, ...], float] = {}
        for n, value, tags in self.values:
            if n == name:
                sums[tuple(tags.values())] = sums.get(tuple(tags.values()), 0) + value
        return sums

    def number(self, name: str, **tags: str) -> int:
        return sum(n == name and tags.items() <= t.items() for n, _, t in self.values)


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(tmp_path_factory.mktemp("store"))[2]


@pytest.fixture(scope="module")
def retriever(generation: Path) -> Retriever:
    return Retriever.open(generation)


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask(service: FusedService, *requests: tuple[str, str, Any]) -> list[int]:
    """Send requests to the application in this process; returns their statuses."""

    async def send() -> list[int]:
        transport = httpx.ASGITransport(make_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [(await client.request(m, path, json=body)).status_code for m, path, body in requests]

    return asyncio.run(send())


def test_every_request_and_answer_is_counted(retriever: Retriever) -> None:
    sink = Collected()
    service = FusedService(retriever, 200, 1, {}, metrics=Metrics(sink))
    requests = [
        *[("POST", "/v1/retrieve", {"user_id": str(u), "k": 3}) for u in range(5)],
        *[("POST", "/v1/retrieve", {"k": 3})] * 2,
        ("POST", "/v1/retrieve", {"k": 0}),
        *[("GET", f"/v1/items/{1000 + i}/similar", None) for i in range(3)],
        ("GET", "/v1/items/none/similar", None),
        ("GET", "/secret/42", None),
        ("GET", "/healthz", None),
        ("HEAD", "/healthz", None),
    ]
    statuses = ask(service, *requests)
    assert Counter(statuses) == {200: 12, 404: 2, 422: 1}
    service.close()
    similar = "/v1/items/{item_id:path}/similar"
    assert sink.counter("twotower_requests") == {
        ("/v1/retrieve", "200"): 7,
        ("/v1/retrieve", "422"): 1,
        (similar, "200"): 3,
        (similar, "404"): 1,
        ("other", "404"): 1,
        ("/healthz", "200"): 2,
    }
    assert sink.latest("twotower_request_ms_count", route="/v1/retrieve") == 8
    answers = {("personal",): 5, ("popular",): 2, ("similar",): 3}
    assert sink.counter("twotower_answers") == answers
    for stage in ("encode", "search", "total"):
        assert sink.latest("twotower_stage_ms_count", stage=stage) == 10
    # Who asks for an unknown item waited for a thread, too.
    assert sink.latest("twotower_stage_ms_count", stage="wait") == 11
    sums = {stage: sink.latest("twotower_stage_ms_sum", stage=stage) for stage in ("search", "total")}
    assert sums["total"] > sums["search"] > 0


def test_histograms_are_the_cumulative_counts_of_prometheus() -> None:
    values = [0.1, 0.25, 0.2500001, 1.0, 1.5, 999.0, 1000.0, 1000.1, 1e9]
    sink = Collected()
    metrics = Metrics(sink, flush_s=1000)
    # A histogram goes on growing from one delivery to the next.
    for value in values[:4]:
        metrics.request("/r", 200, value)
    metrics.flush()
    for value in values[4:]:
        metrics.request("/r", 200, value)
    sink.values.clear()
    metrics.close()
    # The oracle: the library that defines the format for Python.
    registry = prometheus_client.CollectorRegistry()
    oracle = prometheus_client.Histogram("h", "", ["route"], buckets=BUCKETS_MS, registry=registry)
    for value in values:
        oracle.labels("/r").observe(value)
    expected = {
        (sample.name.removeprefix("h_"), sample.labels.get("le")): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    found = {
        (name.rpartition("_")[2], tags.get("le")): value
        for name, value, tags in sink.values
        if name.startswith("twotower_request_ms_")
    }
    assert found == pytest.approx(expected)
    assert len(found) == len(BUCKETS_MS) + 3


def test_partial_answers_are_counted_by_group() -> None:
    sink = Collected()
    metrics = Metrics(sink)
    for missing in [("0",), ("0", "1"), ()]:
        metrics.answer(Answer("g", [], "personal", {"total": 1.5}, missing_groups=missing))
    metrics.close()
    assert sink.counter("twotower_partial_answers") == {("0",): 2, ("1",): 1}


def test_the_generation_its_ages_and_swaps() -> None:
    sink = Collected()
    metrics = Metrics(sink, flush_s=1000)
    metrics.serves({"id": "a", "created": "2026-01-31T10:00:00+00:00", "as_of": 1_700_000_000_000_000})
    metrics.flush()
    now = time.time()
    ages = {name: v for name, v, _ in sink.values if name.endswith("age_s")}
    assert now - ages["twotower_data_age_s"] == pytest.approx(1_700_000_000, abs=100)
    assert now - ages["twotower_generation_age_s"] == pytest.approx(1_769_853_600, abs=100)
    assert sink.number("twotower_swaps") == 0
    sink.values.clear()
    metrics.serves({"id": "b", "created": "1", "as_of": None})
    metrics.refused()
    metrics.close()
    info = [(t["generation"], v) for name, v, t in sink.values if name == "twotower_generation_info"]
    assert info == [("a", 0), ("b", 1)]
    assert sink.total("twotower_swaps") == sink.total("twotower_refusals") == 1
    assert sink.number("twotower_data_age_s") == 0
    # Ray forgets a gauge that is not set again.
    sink.values.clear()
    metrics.flush()
    assert [t for name, _, t in sink.values if name == "twotower_generation_info"] == [{"generation": "b"}]


def test_values_are_handed_over_by_a_thread_of_their_own() -> None:
    sink = Collected()
    metrics = Metrics(sink, flush_s=0.01)
    threads = [
        threading.Thread(target=lambda: [metrics.request("/r", 200, 1.0) for _ in range(500)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: sink.total("twotower_requests") == 2000)
    wait_until(lambda: sink.latest("twotower_request_ms_count") == 2000)
    # They are summed up first.
    assert sink.number("twotower_requests") < 1000
    metrics.close()


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_swaps_and_refusals_are_counted_and_logged(generation: Path, retriever: Retriever) -> None:
    sink = Collected()
    lines = Lines()
    # Ray's loggers pass nothing on to the root's, where pytest listens.
    logger = logging.getLogger("ray.serve.twotower")
    logger.addHandler(lines)
    try:
        service = FusedService(retriever, 200, 1, {}, metrics=Metrics(sink))
        service.front = Retriever.open(generation)
        service.refused("g9", "shard 3 is damaged")
        service.close()
    finally:
        logger.removeHandler(lines)
    assert sink.counter("twotower_swaps") == sink.counter("twotower_refusals") == {(): 1}
    assert [record.event for record in lines.records] == [
        "started",
        "generation_switched",
        "generation_refused",
        "stopped",
    ]
    refused = lines.records[2]
    assert (refused.levelname, refused.generation, refused.reason) == ("ERROR", "g9", "shard 3 is damaged")


def test_index_recall_of_answers(retriever: Retriever) -> None:
    query = Query(k=10, user_id="3", filter={"year": {"gte": 1960}})
    ids = [i["item_id"] for i in retriever.retrieve(query).items]
    others = [str(1000 + i) for i in range(NUM_ITEMS) if str(1000 + i) not in ids]
    assert retriever.index_recall(query, ids) == 1.0
    assert retriever.index_recall(query, ids[:7] + others[:3]) == pytest.approx(0.7)
    # Fewer than k are allowed: those are all there is to find.
    few = Query(k=10, user_id="3", exclude_seen=False, allow_items=["1001", "1002", "1003", "1004"])
    assert retriever.index_recall(few, ["1001", "1002"]) == 0.5
    assert retriever.index_recall(Query(k=10), ids) is None
    assert retriever.index_recall(Query(k=10, user_id="3", allow_items=["none"]), []) is None


def test_every_nth_answer_is_probed(retriever: Retriever) -> None:
    reported: list[float] = []
    probe = Probe(3, Retriever.index_recall, reported.append, share=1.0, latest=2)
    queries = [Query(k=10, user_id=str(u)) for u in range(12)]
    for number, query in enumerate(queries, start=1):
        answer = retriever.retrieve(query)
        if number in (6, 12):
            # Half of the items are not the best.
            answer.items[5:] = retriever.retrieve(Query(k=NUM_ITEMS, user_id=query.user_id)).items[-5:]
        probe.offer(retriever, query, answer)
        expected = number // 3
        wait_until(lambda expected=expected: len(reported) == expected)
    # The mean of the latest two.
    assert reported == pytest.approx([1.0, 0.75, 0.75, 0.75])
    probe.close()


def test_probes_never_hold_up_and_keep_no_generation(generation: Path, retriever: Retriever) -> None:
    reached, go = threading.Event(), threading.Event()
    reported: list[float] = []

    def report(value: float) -> None:
        reported.append(value)
        reached.set()
        assert go.wait(20)

    probe = Probe(1, Retriever.index_recall, report, share=1.0)
    query = Query(k=5, history=[HistoryItem("1001")])
    answer = retriever.retrieve(query)
    probe.offer(retriever, query, answer)
    assert reached.wait(20)
    # Its thread is held now. A thousand answers more are offered, of a generation that goes.
    old = Retriever.open(generation)
    for _ in range(1000):
        probe.offer(old, query, answer)
    gone = weakref.ref(old)
    del old
    gc.collect()
    assert gone() is None
    go.set()
    probe.offer(retriever, query, answer)
    wait_until(lambda: probe._waiting.empty())
    probe.offer(retriever, query, answer)
    wait_until(lambda: len(reported) >= 2)
    assert len(reported) <= 3
    probe.close()


def test_a_probe_that_fails_is_not_the_last(retriever: Retriever) -> None:
    reported: list[float] = []
    probe = Probe(1, Retriever.index_recall, reported.append, share=1.0)
    answer = Answer(retriever.generation_id, [{"item_id": "no such item"}], "personal", {})
    probe.offer(retriever, Query(k=5, user_id="3"), answer)
    good = Query(k=5, user_id="3")
    probe.offer(retriever, good, retriever.retrieve(good))
    wait_until(lambda: reported)
    assert reported == [1.0]
    probe.close()


def test_probes_rest_as_their_share_asks(retriever: Retriever) -> None:
    """At a share of a core so small that the second probe would come in minutes, it does not come at once."""
    reported: list[float] = []
    probe = Probe(1, Retriever.index_recall, reported.append, share=1e-7)
    query = Query(k=5, user_id="3")
    answer = retriever.retrieve(query)
    for _ in range(3):
        probe.offer(retriever, query, answer)
    wait_until(lambda: reported)
    time.sleep(0.2)
    assert len(reported) == 1
    probe.close()


def test_the_service_probes_its_answers(retriever: Retriever) -> None:
    sink = Collected()
    service = FusedService(retriever, 200, 1, {}, metrics=Metrics(sink, flush_s=0.01), probe_every=1)
    ask(service, ("POST", "/v1/retrieve", {"user_id": "3", "k": 5}))
    wait_until(lambda: sink.total("twotower_probes") == 1)
    wait_until(lambda: sink.number("twotower_index_recall") > 0)
    assert {value for name, value, _ in sink.values if name == "twotower_index_recall"} == {1.0}
    service.close()


def test_without_a_sink_nothing_is_kept(retriever: Retriever) -> None:
    metrics = Metrics()
    metrics.answer(retriever.retrieve(Query(k=3)))
    metrics.request("/r", 200, np.pi)
    metrics.flush()
    assert not metrics._counts
    assert not metrics._distributions
