"""The measurement behind a filter plan: what each strategy takes at each share of the items.

The sets of allowed items are those of predicates over the attributes that there are. At shares that no
attribute has, half of them are drawn at random, and the others lean to a direction among the vectors, as an
attribute does that has to do with what the towers learned.

Symbols: Q queries, D embedding_dim, K results, N items.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from twotower.index.allowed import Allowed
from twotower.index.filter_plan import SHARES, FilterPlan, Point, Strategy, Timing
from twotower.index.hits import FloatArray, Hits, IntArray
from twotower.index.recall import index_recall_at_k
from twotower.index.search import Searcher, exact_top_k
from twotower.index.spec import Effort

Blocks = Callable[[], Iterable[tuple[IntArray, FloatArray]]]

Draw = Callable[[float, np.random.Generator], Allowed | None]

_SETS = 8
"""Sets of allowed items at each share."""
_LEAN = 1.0
"""Weight of the direction that every other set leans to, over that of chance."""
_SAMPLE = 100_000
_GATHERED = 200_000
"""More items than that are not gathered: it would take many times as long as the other ways."""
_OVER_FETCHED = 20.0
"""Times k up to which more is fetched."""


@dataclass(frozen=True)
class _Case:
    """A set of allowed items, the queries that are asked of it, and their exact answers."""

    allowed: Allowed
    queries: FloatArray
    exact: list[Hits]


def measure_filters(
    searcher: Searcher,
    queries: FloatArray,
    blocks: Blocks,
    k: int,
    target: float,
    seed: int,
    draw: Draw | None = None,
) -> FilterPlan:
    """Return what each strategy takes at each share of the items, at the least effort that reaches a target.

    Args:
        searcher: over the built shards.
        queries: [Q, D] float32, at least as many as there are sets.
        blocks: gives (item_rows [n], vectors [n, D]) of all items, as encoded, each time it is called.
        k: K.
        target: share of the exact top k among the allowed items that is to be found.
        seed: of the draw of sets.
        draw: gives a set of about a share of the items, None where it has none; ``Attributes.drawn``.
    """
    points = []
    for share in SHARES:
        count = share * searcher.num_items
        if count < 1:
            break
        cases = _cases(searcher, queries, blocks, k, share, seed, draw)
        timings: dict[Strategy, Timing] = {}
        for strategy in ("gather", "selector", "over_fetch"):
            if strategy == "gather" and count > _GATHERED:
                continue
            if strategy == "over_fetch" and 1 / share > _OVER_FETCHED:
                continue
            timing = _timing(searcher, cases, k, target, strategy)
            if timing is not None:
                timings[strategy] = timing
        if draw is not None:
            share = float(np.mean([case.allowed.count for case in cases])) / searcher.num_items
        points.append(Point(share, timings))
    return FilterPlan(sorted(points, key=lambda point: -point.share))


def _timing(
    searcher: Searcher, cases: Sequence[_Case], k: int, target: float, strategy: Strategy
) -> Timing | None:
    """Return the median time at the least effort that reaches the target; None when none does."""
    steps = [Effort()] if strategy == "gather" else searcher.efforts()
    shares, times = _run(searcher, cases, k, strategy, steps[-1])
    if strategy != "gather":
        if shares.mean() < target:
            return None
        low, high = -1, len(steps) - 1
        while high - low > 1:
            middle = (low + high) // 2
            found, took = _run(searcher, cases, k, strategy, steps[middle])
            # One standard error more, since the plan is used for other sets and queries.
            if found.mean() >= min(target + found.std() / math.sqrt(len(found)), 1.0):
                high, times = middle, took
            else:
                low = middle
        steps = steps[: high + 1]
    return Timing(float(np.median(times)) * 1e3, steps[-1])


def _run(
    searcher: Searcher, cases: Sequence[_Case], k: int, strategy: Strategy, effort: Effort
) -> tuple[FloatArray, FloatArray]:
    """Return the share of the exact answer that each query finds, and its seconds."""
    shares, times = [], []
    for case in cases:
        for query, exact in zip(case.queries, case.exact, strict=True):
            start = time.perf_counter()
            # Not complete: the further search of short queries would hide how little an effort finds.
            found = searcher.search(
                query[None], k, None, effort, complete=False, allowed=case.allowed, strategy=strategy
            )
            times.append(time.perf_counter() - start)
            shares.append(index_recall_at_k(found, [exact], k))
    return np.array(shares, np.float32), np.array(times, np.float32)


def _cases(
    searcher: Searcher,
    queries: FloatArray,
    blocks: Blocks,
    k: int,
    share: float,
    seed: int,
    draw: Draw | None,
) -> list[_Case]:
    """Draw sets of a share of the items, and search them exactly."""
    rng = np.random.default_rng([seed, int(1 / share)])
    found = [None if draw is None else draw(share, rng) for _ in range(_SETS)]
    missing = found.count(None)
    made = iter(_made_sets(searcher.num_rows, blocks, share, missing, rng) if missing else ())
    cases = []
    for each, some in zip(found, np.array_split(queries, _SETS), strict=True):
        allowed = next(made) if each is None else each
        exact = exact_top_k(some, 2 * k, _among(blocks(), allowed.mask()))
        cases.append(_Case(allowed, some, exact))
    return cases


def _made_sets(
    num_rows: int, blocks: Blocks, share: float, count: int, rng: np.random.Generator
) -> list[Allowed]:
    """Return sets of a share of the items, every other one by chance alone."""
    directions, thresholds = _leaning(blocks, share, rng)
    masks = [np.zeros(num_rows, np.bool_) for _ in range(count)]
    for number, mask in enumerate(masks):
        for item_rows, vectors in blocks():
            chance = rng.standard_normal(len(item_rows)).astype(np.float32)
            if number % 2:
                mask[item_rows] = chance + vectors @ directions[number] > thresholds[number]
            else:
                mask[item_rows] = rng.random(len(item_rows)) < share
    return [Allowed.of_mask(mask) for mask in masks]


def _leaning(blocks: Blocks, share: float, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Return a direction for each set, and the least score of the share of the items that lean to it most."""
    sample = []
    total = 0
    for _, vectors in blocks():
        sample.append(np.array(vectors[:_SAMPLE]))
        total += len(sample[-1])
        if total >= _SAMPLE:
            break
    drawn = np.concatenate(sample)
    directions = drawn[rng.integers(0, len(drawn), _SETS)]
    scores = drawn @ directions.T
    # As much of chance as of the direction.
    directions = directions * (_LEAN / np.maximum(scores.std(axis=0), 1e-6))[:, None]
    leaning = drawn @ directions.T + rng.standard_normal(scores.shape).astype(np.float32)
    return directions.astype(np.float32), np.quantile(leaning, 1 - share, axis=0).astype(np.float32)


def _among(
    blocks: Iterable[tuple[IntArray, FloatArray]], mask: np.ndarray
) -> Iterator[tuple[IntArray, FloatArray]]:
    for item_rows, vectors in blocks:
        inside = mask[item_rows]
        if inside.any():
            yield item_rows[inside], vectors[inside]
