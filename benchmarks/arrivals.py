"""What became of the requests of a load: when each was due, how long it took, what failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

TIMEOUT, CONNECTION, GARBAGE = "timeout", "connection", "no HTTP"


@dataclass(frozen=True)
class Arrival:
    """One request: when it was due and how long it took."""

    due_s: float
    """Seconds after the start."""
    latency_s: float
    """From when it was due until its answer was complete, or until it failed."""
    error: str | None
    """timeout, connection, no HTTP, status 503 and the like, or as the caller judged it; None if good."""


@dataclass
class LoadResult:
    """What became of every request that was due."""

    arrivals: list[Arrival] = field(default_factory=list)
    """In the order of their ends."""
    begin: float = 0.0
    """``time.monotonic()`` of the start."""
    wall_s: float = 0.0
    """Until the last request had ended."""
    cpu_s: float = 0.0
    """CPU time of the generator."""
    late_s: list[float] = field(default_factory=list)
    """How late the generator itself was at each request: above a millisecond, distrust the latencies."""

    @property
    def count(self) -> int:
        """Requests that were due."""
        return len(self.arrivals)

    @property
    def errors(self) -> Counter[str]:
        """Failed requests by kind."""
        return Counter(arrival.error for arrival in self.arrivals if arrival.error is not None)

    @property
    def cpu_share(self) -> float:
        """CPU seconds of the generator for each second of the run."""
        return self.cpu_s / self.wall_s

    @property
    def achieved_rate(self) -> float:
        """Good answers for each second of the run."""
        return sum(arrival.error is None for arrival in self.arrivals) / self.wall_s

    def due_between(self, begin_s: float, end_s: float) -> list[Arrival]:
        """Return the requests due from ``begin_s`` to before ``end_s`` that were answered or timed out."""
        return [a for a in self.arrivals if begin_s <= a.due_s < end_s and a.error in (None, TIMEOUT)]

    def percentile_ms(self, percent: float) -> float:
        """Return the latency that a share of the answered and the timed-out requests stayed within."""
        return percentile([a.latency_s for a in self.due_between(0.0, math.inf)], percent) * 1e3


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least value that at least this share of the values does not exceed; NaN of no values."""
    if not values:
        return math.nan
    # Rounded, since 99.9 percent of 1,000 must not be the 1,000th.
    place = math.ceil(round(len(values) * percent / 100, 6))
    return sorted(values)[max(place, 1) - 1]
