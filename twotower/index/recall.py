"""Index recall: how much of the exact top k an index finds, and the least effort that finds enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twotower.index.search import Hits, Searcher
from twotower.index.spec import Effort, efforts

NEAR_TIE = 1e-6
"""Scores closer than this count as equal: kernels differ in the last bits."""


def index_recall_at_k(found: Sequence[Hits], exact: Sequence[Hits], k: int) -> float:
    """Return the mean share of the exact top k that was found, in [0, 1].

    Args:
        found: an index's hits, one for each query.
        exact: hits of exact search over the same items; give more than k of each where scores may tie at the
            edge, since any item within ``NEAR_TIE`` of the k-th score counts.
        k: 1 or more; a query with fewer exact hits is measured at their number.
    """
    shares = []
    for mine, truth in zip(found, exact, strict=True):
        size = min(k, len(truth.item_rows))
        if size == 0:
            continue
        good = truth.item_rows[truth.scores >= truth.scores[size - 1] - NEAR_TIE]
        shares.append(min(len(np.intersect1d(mine.item_rows[:k], good)), size) / size)
    return float(np.mean(shares)) if shares else 1.0


def least_effort(
    searcher: Searcher, queries: npt.NDArray[np.float32], exact: Sequence[Hits], k: int, target: float
) -> Effort:
    """Return the least effort whose index recall reaches the target, or the most there is when none does.

    Args:
        searcher: over the built shards.
        queries: [Q, D] float32, not those that the result is reported on.
        exact: hits of exact search, more than k of each.
        k: of index_recall_at_k.
        target: in (0, 1].
    """
    steps = efforts(searcher.shards[0].index) if searcher.shards else [Effort()]
    for effort in steps[:-1]:
        # Without the exact search that makes up for an index that returns too few: it would hide how few.
        found = searcher.search(queries, k, effort=effort, complete=False)
        if index_recall_at_k(found, exact, k) >= target:
            return effort
    return steps[-1]
