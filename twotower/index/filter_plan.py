"""How to search among some of the items: the fastest of three ways, as measured when the index was built.

=============  ==========================================================================================
strategy       what it does
=============  ==========================================================================================
``gather``     scores the vectors of all allowed items: exact, and its time grows with their number
``selector``   FAISS passes over the other items while it scans; fewer allowed items need more effort
``over_fetch`` searches for more than k among all items, and drops the others
=============  ==========================================================================================

Symbols: N items, K results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from twotower.index.spec import Effort

Strategy = Literal["gather", "selector", "over_fetch"]

SHARES = (0.5, 0.1, 0.01, 0.001)
"""Shares of the items at which the strategies are measured."""

_GATHERED = 2_000
"""Allowed items up to which an index that was not measured scores all of them."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and how hard it looks."""

    strategy: Strategy
    effort: Effort


@dataclass(frozen=True)
class Timing:
    """What a strategy took at one share of the items."""

    ms: float
    """Median milliseconds of a single query."""
    effort: Effort
    """The least that reached the target; of no meaning to gather."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return what ``dataclasses.asdict`` made."""
        return cls(float(value["ms"]), Effort(**value["effort"]))


@dataclass(frozen=True)
class Point:
    """The strategies at one share of the items; one that is missing was too slow or missed the target."""

    share: float
    timings: dict[Strategy, Timing]


@dataclass(frozen=True)
class FilterPlan:
    """Measured strategies, the greatest share first."""

    points: Sequence[Point]

    def choose(self, count: int, num_items: int, k: int) -> Choice | None:
        """Return the strategy that is the fastest for a number of allowed items; None without points.

        Times and efforts lie between those measured on both sides.

        Args:
            count: allowed items.
            num_items: N.
            k: K; no more allowed items than that are always gathered.
        """
        if not self.points:
            return None
        share = count / max(num_items, 1)
        larger = [p for p in self.points if p.share >= share]
        smaller = [p for p in self.points if p.share <= share]
        above, below = (larger or self.points[:1])[-1], (smaller or self.points[-1:])[0]
        best: Choice | None = None
        least = math.inf
        for strategy in ("gather", "selector", "over_fetch"):
            first, second = above.timings.get(strategy), below.timings.get(strategy)
            if second is None:
                continue
            effort = second.effort
            if share < below.share:
                # Fewer items than were measured: gathering gets cheaper, the others find too few.
                ms = second.ms * share / below.share if strategy == "gather" else math.inf
            elif first is None or above.share == below.share:
                # More items than gathering was measured with.
                ms = second.ms * share / below.share if strategy == "gather" else second.ms
            else:
                place = math.log(share / below.share) / math.log(above.share / below.share)
                ms = _between(second.ms, first.ms, place)
                effort = _effort_between(second.effort, first.effort, place)
            if ms < least:
                best, least = Choice(strategy, effort), ms
        if best is None or count <= k:
            return Choice("gather", Effort())
        return best

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"points": [asdict(point) for point in self.points]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the plan that ``to_json`` wrote."""
        return cls(
            [
                Point(
                    float(point["share"]),
                    {name: Timing.from_json(timing) for name, timing in point["timings"].items()},
                )
                for point in value["points"]
            ]
        )


def _between(low: float, high: float, place: float) -> float:
    """Return what lies at a place in [0, 1] from low to high, by the logarithm."""
    return low if low == high else math.exp((1 - place) * math.log(low) + place * math.log(high))


def _effort_between(low: Effort, high: Effort, place: float) -> Effort:
    return Effort(
        nprobe=math.ceil(_between(low.nprobe, high.nprobe, place)),
        ef_search=math.ceil(_between(low.ef_search, high.ef_search, place)),
        k_factor=_between(low.k_factor, high.k_factor, place),
    )


def unmeasured(count: int, num_items: int, effort: Effort) -> Choice:
    """Return a choice for an index that was not measured: safe rather than fast.

    Args:
        count: allowed items.
        num_items: N.
        effort: that a search among all items takes; it is raised as the share falls.
    """
    if count <= _GATHERED:
        return Choice("gather", effort)
    factor = max(num_items / count, 1.0)
    return Choice(
        "selector",
        Effort(
            nprobe=math.ceil(effort.nprobe * factor),
            ef_search=math.ceil(effort.ef_search * min(factor, 8.0)),
            k_factor=effort.k_factor,
        ),
    )
