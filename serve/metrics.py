"""What the service counts and measures, and where it goes: to Ray's Prometheus endpoint, or nowhere.

To record a value takes Ray 4 to 10 microseconds, and sometimes a millisecond. A request only leaves its
values in memory; a thread hands them over, a few at a time, so that it never holds the GIL for long.
This module loads Ray only where a ``RaySink`` is made.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from twotower.retrieval.query import Answer

BUCKETS_MS = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 200, 300, 500, 1000]
"""Upper bounds of the buckets of every histogram."""
_FLUSH_S = 1.0
_MOST_PENDING = 200_000
# About a tenth of a millisecond of work, after which requests get their turn.
_AT_ONCE = 10
_PAUSE_S = 0.0005


@dataclass(frozen=True)
class Spec:
    """One metric. Ray puts ``ray_`` before its name, and ``_total`` behind that of a counter."""

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


class Sink(Protocol):
    """Takes values of the metrics in ``SPECS``."""

    def record(self, name: str, value: float, tags: dict[str, str]) -> None:
        """Add to a counter, set a gauge, or put a value into a histogram."""


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
                self._record[name] = metrics.Histogram(name, spec.text, BUCKETS_MS, tags).observe

    def record(self, name: str, value: float, tags: dict[str, str]) -> None:
        """See ``Sink``."""
        self._record[name](value, tags)


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
        self._pending: deque[tuple[str, float, tuple[str, ...]]] = deque(maxlen=_MOST_PENDING)
        self._generation: tuple[str, float | None, float | None] | None = None
        self._index_recall: float | None = None
        self._end = threading.Event()
        self._one_flush = threading.Lock()
        if sink is not None:
            threading.Thread(target=self._deliver, name="metrics", daemon=True).start()

    def request(self, route: str, status: int, took_ms: float) -> None:
        """Count an HTTP request that was answered."""
        self._add("twotower_requests", 1, route, str(status))
        self._add("twotower_request_ms", took_ms, route)

    def waited(self, took_ms: float) -> None:
        """Note how long a request waited for a thread."""
        self._add("twotower_stage_ms", took_ms, "wait")

    def answer(self, answer: Answer) -> None:
        """Count an answer of the library, and note its timings."""
        for stage, took_ms in answer.timing_ms.items():
            self._add("twotower_stage_ms", took_ms, stage)
        self._add("twotower_answers", 1, answer.strategy)
        for group in answer.missing_groups:
            self._add("twotower_partial_answers", 1, group)

    def serves(self, manifest: dict[str, Any]) -> None:
        """Note which generation answers from now on."""
        before = self._generation
        as_of = manifest["as_of"]
        created = _seconds(str(manifest["created"]))
        self._generation = (str(manifest["id"]), created, None if as_of is None else as_of / 1e6)
        if before is not None:
            self._add("twotower_generation_info", 0, before[0])
            self._add("twotower_swaps", 1)

    def refused(self) -> None:
        """Count a generation that was published and is not served."""
        self._add("twotower_refusals", 1)

    def probed(self, index_recall: float) -> None:
        """Note the index recall of the latest probes after one more."""
        self._index_recall = index_recall
        self._add("twotower_probes", 1)

    def flush(self) -> None:
        """Hand over what is pending now."""
        if self._sink is None:
            return
        with self._one_flush:
            sums: dict[tuple[str, tuple[str, ...]], float] = {}
            handed_over = 0
            for _ in range(len(self._pending)):
                name, value, tags = self._pending.popleft()
                if SPECS[name].kind == "counter":
                    sums[name, tags] = sums.get((name, tags), 0) + value
                    continue
                self._hand_over(name, value, tags)
                handed_over += 1
                if handed_over % _AT_ONCE == 0:
                    self._end.wait(_PAUSE_S)
            for (name, tags), value in sums.items():
                self._hand_over(name, value, tags)
            self._hand_over_state()

    def close(self) -> None:
        """Hand over the rest and end the thread."""
        self._end.set()
        self.flush()

    def _add(self, name: str, value: float, *tags: str) -> None:
        if self._sink is not None:
            self._pending.append((name, value, tags))

    def _hand_over(self, name: str, value: float, tags: tuple[str, ...]) -> None:
        assert self._sink is not None
        self._sink.record(name, value, dict(zip(SPECS[name].tags, tags, strict=True)))

    def _hand_over_state(self) -> None:
        """Set the gauges again: Ray exports a gauge only while it is set from time to time."""
        if self._generation is not None:
            generation_id, created, as_of = self._generation
            self._hand_over("twotower_generation_info", 1, (generation_id,))
            now = time.time()
            if created is not None:
                self._hand_over("twotower_generation_age_s", now - created, ())
            if as_of is not None:
                self._hand_over("twotower_data_age_s", now - as_of, ())
        if self._index_recall is not None:
            self._hand_over("twotower_index_recall", self._index_recall, ())

    def _deliver(self) -> None:
        while not self._end.wait(self._flush_s):
            self.flush()


def _seconds(created: str) -> float | None:
    """Return an ISO 8601 time as seconds since 1970; None where it is none."""
    try:
        time_made = datetime.fromisoformat(created)
    except ValueError:
        return None
    return (time_made if time_made.tzinfo else time_made.replace(tzinfo=UTC)).timestamp()
