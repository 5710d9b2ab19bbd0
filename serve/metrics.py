"""What the service counts and measures, and where it goes: to Ray's Prometheus endpoint, or nowhere.

To record a value takes Ray 4 to 25 microseconds, and sometimes a millisecond, and its histograms take each
value by itself. So a request only adds to sums in memory, and a thread hands those over once a second, a few
at a time, so that it never holds the GIL for long: histograms as the cumulative counts that Prometheus makes
of them.
This module loads Ray only where a ``RaySink`` is made.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from twotower.retrieval.query import Answer

BUCKETS_MS = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 200, 300, 500, 1000]
"""Upper bounds of the buckets of every histogram; one more has none."""
_BOUNDS = (*(str(float(bound)) for bound in BUCKETS_MS), "+Inf")
# Ray drops a gauge that was not set for a second or two.
_FLUSH_S = 1.0
# About a tenth of a millisecond of work, after which requests get their turn.
_AT_ONCE = 10
_PAUSE_S = 0.0005


@dataclass(frozen=True)
class Spec:
    """One metric. Ray puts ``ray_`` before its name, and ``_total`` behind that of a counter.

    A histogram is three gauges that only grow, as Prometheus names them: ``_bucket`` with the tag ``le``,
    ``_sum`` and ``_count``.
    """

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    tags: tuple[str, ...] = ()
    """Beside deployment, replica and application, which Serve adds."""


SPECS = {
    "twotower_requests": Spec("counter", "HTTP requests answered", ("route", "status")),
    "twotower_request_ms": Spec(
        "histogram", "Milliseconds from a request's arrival at the application to its answer", ("route",)
    ),
    "twotower_stage_ms": Spec(
        "histogram",
        "Milliseconds of each stage of an answer: wait (for its turn), encode, search; total is all but wait",
        ("stage",),
    ),
    "twotower_answers": Spec(
        "counter", "Lists of items answered, by what they were made from", ("strategy",)
    ),
    "twotower_partial_answers": Spec("counter", "Answers without a shard group, by that group", ("group",)),
    "twotower_generation_info": Spec("gauge", "1 for the generation that answers", ("generation",)),
    "twotower_generation_age_s": Spec("gauge", "Seconds since the generation was made"),
    "twotower_data_age_s": Spec("gauge", "Seconds since the latest interaction that the generation knows"),
    "twotower_swaps": Spec("counter", "Changes of the generation that answers"),
    "twotower_refusals": Spec("counter", "Generations that were published and refused"),
    "twotower_index_recall": Spec("gauge", "Index recall of the latest probed answers, in [0, 1]"),
    "twotower_probes": Spec("counter", "Answers that were compared with exact search"),
}
"""Every metric of the service by name."""


Record = tuple[str, float, dict[str, str]]
"""Name of a counter or gauge, value, and tags."""


class Sink(Protocol):
    """Takes values of the metrics in ``SPECS``."""

    def record(self, name: str, value: float, tags: dict[str, str]) -> None:
        """Add to a counter, or set a gauge."""


class RaySink:
    """Ray's metrics, which every node exports for Prometheus."""

    def __init__(self) -> None:
        """Make the metrics; in a replica of Serve they get its tags."""
        from ray.serve import metrics

        self._record: dict[str, Callable[[float, dict[str, str]], None]] = {}
        for name, spec in SPECS.items():
            # Ray says tuple[str] and means tuple[str, ...].
            tags: Any = spec.tags
            if spec.kind == "counter":
                self._record[name] = metrics.Counter(name, spec.text, tags).inc
            elif spec.kind == "gauge":
                self._record[name] = metrics.Gauge(name, spec.text, tags).set
            else:
                for part, more in (("bucket", ("le",)), ("sum", ()), ("count", ())):
                    full = f"{name}_{part}"
                    self._record[full] = metrics.Gauge(full, spec.text, tags + more).set

    def record(self, name: str, value: float, tags: dict[str, str]) -> None:
        """See ``Sink``."""
        self._record[name](value, tags)


@dataclass
class Distribution:
    """How many values lay in each bucket, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * len(_BOUNDS))
    sum: float = 0.0

    def add(self, value: float) -> None:
        """Put a value into its bucket: the first whose bound it does not exceed."""
        self.counts[bisect_left(BUCKETS_MS, value)] += 1
        self.sum += value

    def copy(self) -> Distribution:
        """Return one that no longer changes."""
        return Distribution(self.counts.copy(), self.sum)

    def records(self, name: str, tags: dict[str, str]) -> Iterator[Record]:
        """Yield the series of the histogram of this name."""
        total = 0
        for bound, count in zip(_BOUNDS, self.counts, strict=True):
            total += count
            yield f"{name}_bucket", total, {**tags, "le": bound}
        yield f"{name}_sum", self.sum, tags
        yield f"{name}_count", total, tags


class Metrics:
    """What the parts of the service call; without a sink every call does nothing. Threads may share it."""

    def __init__(self, sink: Sink | None = None, flush_s: float = _FLUSH_S) -> None:
        """Start the thread that hands values over.

        Args:
            sink: takes them; None throws them away.
            flush_s: seconds between two deliveries.
        """
        self._sink = sink
        self._flush_s = flush_s
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, tuple[str, ...]], float] = {}
        self._distributions: dict[tuple[str, tuple[str, ...]], Distribution] = {}
        self._generation: tuple[str, float | None, float | None] | None = None
        self._replaced: list[str] = []
        self._index_recall: float | None = None
        self._end = threading.Event()
        self._one_flush = threading.Lock()
        if sink is not None:
            threading.Thread(target=self._deliver, name="metrics", daemon=True).start()

    def request(self, route: str, status: int, took_ms: float) -> None:
        """Count an HTTP request that was answered."""
        if self._sink is not None:
            with self._lock:
                self._count("twotower_requests", route, str(status))
                self._observe("twotower_request_ms", took_ms, route)

    def waited(self, took_ms: float) -> None:
        """Note how long a request waited for a thread."""
        if self._sink is not None:
            with self._lock:
                self._observe("twotower_stage_ms", took_ms, "wait")

    def answer(self, answer: Answer) -> None:
        """Count an answer of the library, and note its timings."""
        if self._sink is not None:
            with self._lock:
                for stage, took_ms in answer.timing_ms.items():
                    self._observe("twotower_stage_ms", took_ms, stage)
                self._count("twotower_answers", answer.strategy)
                for group in answer.missing_groups:
                    self._count("twotower_partial_answers", group)

    def serves(self, manifest: dict[str, Any]) -> None:
        """Note which generation answers from now on."""
        before = self._generation
        as_of = manifest["as_of"]
        created = _seconds(str(manifest["created"]))
        self._generation = (str(manifest["id"]), created, None if as_of is None else as_of / 1e6)
        if before is not None and self._sink is not None:
            with self._lock:
                self._replaced.append(before[0])
                self._count("twotower_swaps")

    def refused(self) -> None:
        """Count a generation that was published and is not served."""
        with self._lock:
            self._count("twotower_refusals")

    def probed(self, index_recall: float) -> None:
        """Note the index recall of the latest probes after one more."""
        self._index_recall = index_recall
        with self._lock:
            self._count("twotower_probes")

    def flush(self) -> None:
        """Hand over what is pending now."""
        if self._sink is None:
            return
        with self._one_flush:
            for number, record in enumerate(self._records(), start=1):
                self._sink.record(*record)
                if number % _AT_ONCE == 0:
                    self._end.wait(_PAUSE_S)

    def close(self) -> None:
        """Hand over the rest and end the thread."""
        self._end.set()
        self.flush()

    def _count(self, name: str, *tags: str) -> None:
        self._counts[name, tags] = self._counts.get((name, tags), 0) + 1

    def _observe(self, name: str, value: float, *tags: str) -> None:
        found = self._distributions.get((name, tags))
        if found is None:
            found = self._distributions[name, tags] = Distribution()
        found.add(value)

    def _records(self) -> Iterator[Record]:
        """Yield what was counted since the last time, and every gauge."""
        with self._lock:
            counts, self._counts = self._counts, {}
            replaced, self._replaced = self._replaced, []
            distributions = {key: found.copy() for key, found in self._distributions.items()}
        for (name, tags), value in counts.items():
            yield name, value, _named(name, tags)
        for (name, tags), found in distributions.items():
            yield from found.records(name, _named(name, tags))
        for generation_id in replaced:
            yield "twotower_generation_info", 0, {"generation": generation_id}
        if self._generation is not None:
            generation_id, created, as_of = self._generation
            yield "twotower_generation_info", 1, {"generation": generation_id}
            now = time.time()
            if created is not None:
                yield "twotower_generation_age_s", now - created, {}
            if as_of is not None:
                yield "twotower_data_age_s", now - as_of, {}
        if self._index_recall is not None:
            yield "twotower_index_recall", self._index_recall, {}

    def _deliver(self) -> None:
        while not self._end.wait(self._flush_s):
            self.flush()


def _named(name: str, tags: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(SPECS[name].tags, tags, strict=True))


def _seconds(created: str) -> float | None:
    """Return an ISO 8601 time as seconds since 1970; None where it is none."""
    try:
        time_made = datetime.fromisoformat(created)
    except ValueError:
        return None
    return (time_made if time_made.tzinfo else time_made.replace(tzinfo=UTC)).timestamp()
