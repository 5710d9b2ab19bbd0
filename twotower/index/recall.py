"""Index recall: how much of the exact top k an index finds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twotower.index.hits import Hits

NEAR_TIE = 1e-6
"""Scores closer than this count as equal: kernels differ in the last bits."""


def index_recall_at_k(found: Sequence[Hits], exact: Sequence[Hits], k: int) -> float:
    """Return the mean share of the exact top k that was found, in [0, 1]; 1 where there is nothing to find.

    Args:
        found: an index's hits, one for each query.
        exact: hits of exact search over the same items; give more than k of each where scores may tie at the
            edge, since any item within ``NEAR_TIE`` of the k-th score counts.
        k: 1 or more; a query with fewer exact hits is measured at their number.
    """
    shares = index_recalls(found, exact, k)
    return float(shares.mean()) if len(shares) else 1.0


def index_recalls(found: Sequence[Hits], exact: Sequence[Hits], k: int) -> npt.NDArray[np.float64]:
    """Return the share of the exact top k that each query found; those without exact hits are left out."""
    shares = []
    for mine, truth in zip(found, exact, strict=True):
        size = min(k, len(truth.item_rows))
        if size == 0:
            continue
        good = truth.item_rows[truth.scores >= truth.scores[size - 1] - NEAR_TIE]
        shares.append(min(len(np.intersect1d(mine.item_rows[:k], good)), size) / size)
    return np.array(shares)
