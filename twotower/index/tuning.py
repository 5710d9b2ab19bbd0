"""From a recall target to the least effort that reaches it, and what is measured around that effort.

Symbols: Q queries, D embedding_dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twotower.index.hits import FloatArray, Hits
from twotower.index.recall import index_recall_at_k, index_recalls
from twotower.index.search import Searcher
from twotower.index.spec import Effort

_TIMED = 256
"""Queries that the time of an effort is measured with, at most."""
_COMPARED = 32
"""Queries that compare the times of efforts which find enough."""
_POINTS = 7
_APART = 1.4
"""An effort over that of the point before it on a curve, at least."""
_DOUBLE = 14
"""Steps after which an effort is about twice as great."""


@dataclass(frozen=True)
class Point:
    """What a search at one effort finds, and what it takes."""

    effort: Effort
    index_recall: float
    """In [0, 1]."""
    search_ms: float
    """Median milliseconds of a single query."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "effort": self.effort.to_json(),
            "index_recall": self.index_recall,
            "search_ms": self.search_ms,
        }


def least_effort(
    searcher: Searcher, queries: FloatArray, exact: Sequence[Hits], k: int, target: float
) -> Effort:
    """Return the least effort whose index recall reaches the target, or finds the most where none does.

    The goal is the target and one standard error of the mean, so that other queries reach the target as well;
    an index that finds less than the goal at its greatest effort is held to what it finds there. The steps
    are halved: an effort is returned when the step below it was measured and falls short.

    Where results are refined, the least number of lists is found for each of several numbers of candidates,
    and the fastest pair is returned.

    Args:
        searcher: over the built shards.
        queries: [Q, D] float32, not those that the result is reported on.
        exact: hits of exact search, more than k of each.
        k: of index_recall_at_k.
        target: in (0, 1].
    """
    ladders = _ladders(searcher)
    most = [_recalls(searcher, queries, exact, k, ladder[-1]) for ladder in ladders]
    ceiling = max(_mean(shares) for shares in most)
    found = []
    for ladder, shares in zip(ladders, most, strict=True):
        if _mean(shares) < min(_goal(shares, target), ceiling):
            continue
        low, high = -1, len(ladder) - 1
        while high - low > 1:
            middle = (low + high) // 2
            shares = _recalls(searcher, queries, exact, k, ladder[middle])
            if _mean(shares) >= min(_goal(shares, target), ceiling):
                high = middle
            else:
                low = middle
        found.append(ladder[high])
    if len(found) == 1:
        return found[0]
    return min(found, key=lambda effort: np.median(search_times(searcher, queries[:_COMPARED], k, effort)))


def curve(
    searcher: Searcher, queries: FloatArray, exact: Sequence[Hits], k: int, chosen: Effort
) -> list[Point]:
    """Measure up to seven efforts around the chosen one, which is among them, from the least to the most.

    Args:
        searcher: over the built shards.
        queries: [Q, D] float32, not those that tuned the search.
        exact: hits of exact search, more than k of each.
        k: of index_recall_at_k.
        chosen: by ``least_effort`` on the same shards.
    """
    ladder = next((ladder for ladder in _ladders(searcher) if chosen in ladder), [chosen])
    around = _spaced(ladder, ladder.index(chosen))
    points = []
    for effort in around:
        recall = index_recall_at_k(searcher.search(queries, k, effort=effort), exact, k)
        times = search_times(searcher, queries[:_TIMED], k, effort)
        points.append(Point(effort, recall, float(np.median(times))))
    return points


def _spaced(ladder: Sequence[Effort], place: int) -> list[Effort]:
    """Return up to seven efforts around a place that are some way apart, or any where there are too few."""
    sizes = [effort.nprobe * effort.ef_search * effort.k_factor for effort in ladder]
    below, above = [place], [place]
    for p in range(place - 1, -1, -1):
        if sizes[p] * _APART <= sizes[below[-1]]:
            below.append(p)
    for p in range(place + 1, len(ladder)):
        if sizes[p] >= sizes[above[-1]] * _APART:
            above.append(p)
    places = below[:0:-1] + above
    if len(places) < _POINTS:
        places = list(range(len(ladder)))
    first = min(max(places.index(place) - _POINTS // 2, 0), max(len(places) - _POINTS, 0))
    return [ladder[p] for p in places[first : first + _POINTS]]


def search_times(searcher: Searcher, queries: FloatArray, k: int, effort: Effort) -> FloatArray:
    """Return the milliseconds of each query [Q, D], searched one by one after one that is not measured."""
    times = []
    for query in (*queries[:1], *queries):
        begin = time.perf_counter()
        searcher.search(query[None], k, effort=effort)
        times.append((time.perf_counter() - begin) * 1e3)
    return np.array(times[1:], np.float32)


def _ladders(searcher: Searcher) -> list[list[Effort]]:
    """Return lists of efforts, each from the least to the most: several where two parts can be traded."""
    steps = searcher.efforts()
    factors = sorted({step.k_factor for step in steps})
    plain = list(dict.fromkeys(replace(step, k_factor=factors[-1]) for step in steps))
    if len(factors) == 1 or len(plain) == 1:
        return [steps]
    # Each is about twice the one before; the last is always among them.
    return [[replace(step, k_factor=factor) for step in plain] for factor in factors[::-1][::_DOUBLE][::-1]]


def _recalls(
    searcher: Searcher, queries: FloatArray, exact: Sequence[Hits], k: int, effort: Effort
) -> FloatArray:
    # Without the exact search that makes up for an index that returns too few: it would hide how few.
    found = searcher.search(queries, k, effort=effort, complete=False)
    return index_recalls(found, exact, k).astype(np.float32)


def _goal(shares: FloatArray, target: float) -> float:
    if len(shares) == 0:
        return target
    return min(target + float(shares.std()) / math.sqrt(len(shares)), 1.0)


def _mean(shares: FloatArray) -> float:
    return float(shares.mean()) if len(shares) else 1.0
