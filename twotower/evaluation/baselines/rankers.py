"""Rankers of fitted baselines, from memory-mapped files.

A query that knows nothing is given the popular order by all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twotower.data.knowledge import Holdout
from twotower.evaluation.baselines.ease import EaseScores
from twotower.evaluation.baselines.popularity import PopularityRanker
from twotower.evaluation.baselines.protocol import baseline
from twotower.evaluation.comparison import Ranker
from twotower.evaluation.matrix import Csr, open_matrix
from twotower.evaluation.ranking import BLOCK_SCORES, rank_block, rank_order, rank_scores

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

KNOWN = "known"
"""Folder of what the queries know, beside those of the baselines."""
POPULAR = "popular.npy"
RECENT = "recent.npy"
SIMILARITY = "similarity"


def open_ranker(name: str, folder: Path) -> Ranker:
    """Return the ranker of a baseline whose files are below ``folder``."""
    order = np.load(folder / POPULAR, mmap_mode="r")
    if name == "popularity":
        return PopularityRanker(order)
    if name == "recent_popularity":
        return PopularityRanker(np.load(folder / RECENT, mmap_mode="r"))
    known = open_matrix(folder / KNOWN)
    return baseline(name).ranker(folder / name, known, order)


def regularised_ranker(name: str, folder: Path, known: Csr, order: Ints) -> Ranker:
    """Return the ranker of EASE^R or iALS.

    Args:
        name: ``ease`` or ``ials``.
        folder: with what was fitted.
        known: [Q, N], what all queries know.
        order: [N] catalogue items, the most popular first.
    """
    if name == "ease":
        return MatrixRanker(EaseScores(folder), known, order)
    return FactorRanker(folder, known, order)


class NeighbourScores:
    """Sums of similarities; items that no known one is near to follow by popularity."""

    def __init__(self, similarity: Csr, order: Ints) -> None:
        """Take similarities [N, N] and catalogue items [N], the most popular first."""
        self._similarity = similarity
        self._behind = np.empty(len(order), dtype=np.float32)
        # Below every sum, and exact in 32 bits up to 16 million items.
        self._behind[order] = -1.0 - np.arange(len(order), dtype=np.float32)

    def __call__(self, known: Csr) -> Floats:
        """Return the scores [Q, N] float32 of queries that know [Q, N]."""
        scores = np.asarray((known @ self._similarity).toarray(), dtype=np.float32)
        np.copyto(scores, self._behind, where=scores <= 0)
        return scores


class MatrixRanker:
    """Ranks by scores that are computed from what a query knows."""

    def __init__(self, scores: Callable[[Csr], Floats], known: Csr, order: Ints) -> None:
        """Take a function of [Q, N] to scores [Q, N], what all queries know, and the popular order [N]."""
        self._scores = scores
        self._known = known
        self._order = order

    def __call__(self, start: int, part: Holdout, k: int) -> Ints:
        """Return [Q, k] int64."""
        step = max(1, BLOCK_SCORES // max(1, self._known.shape[1]))
        lists = [np.empty((0, k), dtype=np.int64)]
        for first in range(0, len(part), step):
            piece = part.part(first, min(first + step, len(part)))
            known = self._known[start + first : start + first + len(piece)]
            ranked = rank_scores(self._scores(known), piece.masked_offsets, piece.masked_rows, k)
            lists.append(or_popular(ranked, known, piece, self._order, k))
        return np.concatenate(lists)


class FactorRanker:
    """Ranks by the dot product of factors."""

    def __init__(self, folder: Path, known: Csr, order: Ints) -> None:
        """Open what ``ials.fit_ials`` wrote; see ``MatrixRanker`` for the others."""
        self._queries = np.load(folder / "queries.npy", mmap_mode="r")
        self._items = np.load(folder / "items.npy", mmap_mode="r")
        self._known = known
        self._order = order

    def __call__(self, start: int, part: Holdout, k: int) -> Ints:
        """Return [Q, k] int64."""
        stop = start + len(part)
        ranked = rank_block(self._queries[start:stop], self._items, part.masked_offsets, part.masked_rows, k)
        return or_popular(ranked, self._known[start:stop], part, self._order, k)


def or_popular(ranked: Ints, known: Csr, part: Holdout, order: Ints, k: int) -> Ints:
    """Return lists [Q, k] with the popular order for queries that know nothing."""
    nothing = np.diff(known.indptr) == 0
    if nothing.any():
        ranked[nothing] = rank_order(order, part.masked_offsets, part.masked_rows, k)[nothing]
    return ranked
