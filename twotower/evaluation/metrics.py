"""Ranking metrics over held-out items, and sums of them that merge over parts.

Every function takes ranked lists and relevant sets as arrays:

- ``ranked`` [Q, K] int64: item rows, best first, -1 behind the last one; no item twice in a list.
- ``relevant_offsets`` [Q + 1] int64 and ``relevant_rows`` int64: the relevant items of query q are
  ``relevant_rows[relevant_offsets[q]:relevant_offsets[q + 1]]``, a set: order and repeats do not matter.

A query without relevant items has no metric: NaN per query, left out of every mean.
Legend: Q queries, K columns of a ranked list, k cut-off, N catalogue items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOP_LIST_LENGTH = 10
"""Length of the lists that ``share_same_top10`` compares."""


def hit_matrix(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """Return which ranked items are relevant, and how many relevant items each query has.

    Returns:
        [Q, K] bool, false at padding; and [Q] int64, distinct relevant items.

    Raises:
        ValueError: the arrays do not fit together, or a list names an item twice.
    """
    ranked = np.asarray(ranked, dtype=np.int64)
    offsets = np.asarray(relevant_offsets, dtype=np.int64)
    rows = np.asarray(relevant_rows, dtype=np.int64)
    num_queries = len(ranked)
    if ranked.ndim != 2 or len(offsets) != num_queries + 1:
        raise ValueError(
            f"ranked has shape {ranked.shape} and relevant_offsets {offsets.shape}; "
            "they must be [Q, K] and [Q + 1]"
        )
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(rows) or (lengths < 0).any():
        raise ValueError(
            f"relevant_offsets must rise from 0 to the {len(rows)} relevant rows; they go from "
            f"{offsets[0]} to {offsets[-1]}"
        )
    if len(rows) and rows.min() < 0:
        raise ValueError(f"relevant_rows holds {rows.min()}; item rows are 0 or greater")
    _refuse_repeats(ranked)
    # One number per (query, item) pair turns the Q set intersections into one.
    width = int(max(rows.max(initial=-1), ranked.max(initial=-1))) + 1
    query = np.arange(num_queries, dtype=np.int64)
    pairs = np.unique(np.repeat(query, lengths) * width + rows)
    num_relevant = np.bincount(pairs // max(width, 1), minlength=num_queries).astype(np.int64)
    hits = np.isin(query[:, None] * width + ranked, pairs) & (ranked >= 0)
    return hits, num_relevant


def recall_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query the relevant items in the top k over all relevant items: [Q] float64 in [0, 1]."""
    return _one(_recall, ranked, relevant_offsets, relevant_rows, k)


def ndcg_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query DCG over ideal DCG with gain 1 and discount log2(rank + 1): [Q] float64 in [0, 1].

    The ideal list has min(k, relevant items) hits, so that a perfect list scores 1 for every k.

    Source: Jarvelin and Kekalainen (2002), "Cumulated gain-based evaluation of IR techniques".
    """
    return _one(_ndcg, ranked, relevant_offsets, relevant_rows, k)


def mrr_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query 1 / rank of the first relevant item, 0 where the top k has none: [Q] float64."""
    return _one(_mrr, ranked, relevant_offsets, relevant_rows, k)


def hit_rate_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query 1 where a relevant item is in the top k, else 0: [Q] float64."""
    return _one(_hit_rate, ranked, relevant_offsets, relevant_rows, k)


def catalogue_coverage(ranked: Ints, num_items: int, k: int) -> float:
    """Return the share of the ``num_items`` catalogue items that occur in any top k."""
    stats = ListStats(num_items, [k])
    stats.add(ranked)
    return stats.result()[f"coverage@{k}"]


def share_same_top10(ranked: Ints) -> float:
    """Return the share of lists whose ten items, in order, are the most common ones; NaN without lists."""
    stats = ListStats(int(np.max(ranked, initial=-1)) + 1, [])
    stats.add(ranked)
    return stats.result()["same_top10"]


class MetricSums:
    """Sums of the metrics over queries; sums of parts add up to the sums of the whole.

    Args:
        ks: cut-offs, each at least 1.
    """

    def __init__(self, ks: Sequence[int]) -> None:
        if not ks or min(ks) < 1:
            raise ValueError(f"ks is {list(ks)}; give at least one cut-off, each at least 1")
        self.ks = sorted(set(int(k) for k in ks))
        self._sums = np.zeros((len(_METRICS), len(self.ks)))
        self._count = 0.0

    @property
    def num_queries(self) -> int:
        """Queries with relevant items that were added."""
        return int(self._count)

    def add(self, ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints) -> None:
        """Add the metrics of Q queries; those without relevant items are left out.

        Args:
            ranked: [Q, K] int64 item rows, best first, -1 padded, K at least the largest cut-off.
            relevant_offsets: [Q + 1] int64.
            relevant_rows: int64 item rows.
        """
        ranked = np.asarray(ranked, dtype=np.int64)
        if ranked.ndim == 2 and ranked.shape[1] < self.ks[-1]:
            raise ValueError(
                f"ranked has {ranked.shape[1]} columns; the cut-off {self.ks[-1]} needs as many (pad with -1)"
            )
        hits, num_relevant = hit_matrix(ranked, relevant_offsets, relevant_rows)
        counted = num_relevant > 0
        hits, num_relevant = hits[counted], num_relevant[counted]
        self._count += len(num_relevant)
        for row, metric in enumerate(_METRICS.values()):
            for column, k in enumerate(self.ks):
                self._sums[row, column] += metric(hits[:, :k], num_relevant, k).sum()

    def state(self) -> Floats:
        """Return [1 + 4 * cut-offs] float64: the count and the sums. States of parts may be added up."""
        return np.concatenate([[self._count], self._sums.ravel()])

    def merge(self, state: Floats) -> None:
        """Add the state of another part with the same cut-offs."""
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (1 + self._sums.size,):
            raise ValueError(
                f"the state has shape {state.shape}; cut-offs {self.ks} need {1 + self._sums.size} numbers"
            )
        self._count += float(state[0])
        self._sums += state[1:].reshape(self._sums.shape)

    def result(self) -> dict[str, float]:
        """Return the means by name, such as ``recall@10``; NaN where no query was counted."""
        count = self._count or float("nan")
        return {
            f"{name}@{k}": float(self._sums[row, column] / count)
            for row, name in enumerate(_METRICS)
            for column, k in enumerate(self.ks)
        }


class ListStats:
    """What the lists of all queries look like together: catalogue coverage, and how many are the same.

    Args:
        num_items: catalogue items N.
        ks: cut-offs of the coverage.
    """

    def __init__(self, num_items: int, ks: Sequence[int]) -> None:
        self.num_items = num_items
        self.ks = sorted(set(int(k) for k in ks))
        self.covered = np.zeros((len(self.ks), num_items), dtype=bool)
        self._digests: list[NDArray[np.uint64]] = []

    def add(self, ranked: Ints) -> None:
        """Add lists [Q, K] int64, best first, -1 padded."""
        ranked = np.asarray(ranked, dtype=np.int64)
        if ranked.max(initial=-1) >= self.num_items:
            raise ValueError(
                f"ranked names item row {ranked.max()}; the catalogue has {self.num_items} items"
            )
        for row, k in enumerate(self.ks):
            top = ranked[:, :k]
            self.covered[row, top[top >= 0]] = True
        self._digests.append(_digest(ranked[:, :TOP_LIST_LENGTH]))

    def state(self) -> dict[str, bytes]:
        """Return what ``merge`` takes, small: N bits a cut-off and 8 bytes a list."""
        return {"covered": np.packbits(self.covered).tobytes(), "digests": self._all_digests().tobytes()}

    def merge(self, state: dict[str, bytes]) -> None:
        """Add the state of another part with the same catalogue and cut-offs."""
        bits = np.frombuffer(state["covered"], dtype=np.uint8)
        if len(bits) != (self.covered.size + 7) // 8:
            raise ValueError(
                f"the state covers {len(bits) * 8} bits; this catalogue and cut-offs need {self.covered.size}"
            )
        self.covered |= np.unpackbits(bits, count=self.covered.size).reshape(self.covered.shape).astype(bool)
        self._digests.append(np.frombuffer(state["digests"], dtype=np.uint64))

    def result(self) -> dict[str, float]:
        """Return ``coverage@k`` for each cut-off and ``same_top10``; NaN without items or lists."""
        shares = {
            f"coverage@{k}": float(row.mean()) if self.num_items else float("nan")
            for k, row in zip(self.ks, self.covered, strict=True)
        }
        digests = self._all_digests()
        counts = np.unique(digests, return_counts=True)[1]
        shares["same_top10"] = float(counts.max() / len(digests)) if len(digests) else float("nan")
        return shares

    def _all_digests(self) -> NDArray[np.uint64]:
        return np.concatenate([np.empty(0, dtype=np.uint64), *self._digests])


def _digest(lists: Ints) -> NDArray[np.uint64]:
    """[Q] uint64: equal lists have equal digests, others differ but for a chance of 2**-64 a pair."""
    digest = np.full(len(lists), lists.shape[1], dtype=np.uint64)
    for column in lists.T:
        # The finaliser of splitmix64 after each item, so that the order counts.
        digest ^= column.astype(np.uint64)
        digest += np.uint64(0x9E3779B97F4A7C15)
        digest = (digest ^ (digest >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        digest = (digest ^ (digest >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        digest ^= digest >> np.uint64(31)
    return digest


def _refuse_repeats(ranked: Ints) -> None:
    ordered = np.sort(ranked, axis=1)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if repeated.any():
        raise ValueError(f"list {int(repeated.argmax())} names an item twice; a ranking names each item once")


_Metric = Callable[[NDArray[np.bool_], Ints, int], Floats]


def _one(metric: _Metric, ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    hits, num_relevant = hit_matrix(ranked, relevant_offsets, relevant_rows)
    values = metric(hits[:, :k], np.maximum(num_relevant, 1), k)
    return np.where(num_relevant > 0, values, np.nan)


def _recall(hits: NDArray[np.bool_], num_relevant: Ints, k: int) -> Floats:
    return np.asarray(hits.sum(axis=1) / num_relevant, dtype=np.float64)


def _ndcg(hits: NDArray[np.bool_], num_relevant: Ints, k: int) -> Floats:
    discounts: Floats = 1.0 / np.log2(np.arange(2, k + 2))
    ideal: Floats = np.cumsum(discounts)[np.minimum(num_relevant, k) - 1]
    # Summed in the same order as the ideal, so that a perfect list scores exactly 1.
    gains = np.cumsum(hits * discounts[: hits.shape[1]], axis=1)
    found: Floats = gains[:, -1] if hits.shape[1] else np.zeros(len(hits))
    return found / ideal


def _mrr(hits: NDArray[np.bool_], num_relevant: Ints, k: int) -> Floats:
    if not hits.shape[1]:
        return np.zeros(len(hits))
    return np.asarray(hits.any(axis=1) / (hits.argmax(axis=1) + 1), dtype=np.float64)


def _hit_rate(hits: NDArray[np.bool_], num_relevant: Ints, k: int) -> Floats:
    return np.asarray(hits.any(axis=1), dtype=np.float64)


_METRICS: dict[str, _Metric] = {"recall": _recall, "ndcg": _ndcg, "mrr": _mrr, "hit_rate": _hit_rate}
