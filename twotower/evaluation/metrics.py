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
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from twotower.registry import Registry

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Hits:
    """Which ranked items of Q queries are relevant; what several metrics need is computed once."""

    hits: NDArray[np.bool_]
    """[Q, K] bool, K at least 1."""
    total: Ints
    """[Q] int64, relevant items of each query, at least 1: what has none is left out behind the metrics."""
    cuts: Ints
    """[cut-offs] int64; ranks behind the K-th have no hit."""

    @cached_property
    def at(self) -> Ints:
        """[cut-offs], the column of each cut-off's last rank."""
        return np.minimum(self.cuts, self.hits.shape[1]) - 1

    @cached_property
    def found(self) -> Ints:
        """[Q, K], relevant items up to each rank."""
        return np.cumsum(self.hits, axis=1)

    @cached_property
    def first(self) -> Ints:
        """[Q, 1], rank of the first relevant item, K + 1 where there is none."""
        none = self.hits.shape[1] + 1
        return np.where(self.hits.any(axis=1), self.hits.argmax(axis=1) + 1, none)[:, None]


Metric = Callable[[Hits], "Floats | NDArray[np.bool_]"]
"""Makes [Q, cut-offs] of hits; the larger, the better a list."""
METRICS: Registry[Metric] = Registry("a metric")
"""Metrics of a list against a query's relevant items, in the order of a report."""


def _ndcg(h: Hits) -> Floats:
    width = h.hits.shape[1]
    discounts = 1.0 / np.log2(np.arange(2, max(width, int(h.cuts.max())) + 2))
    # Gains are summed in the same order as the ideal, so that a perfect list scores exactly 1.
    gains = np.cumsum(h.hits * discounts[:width], axis=1)
    ideal = np.cumsum(discounts)[np.minimum(h.total[:, None], h.cuts) - 1]
    return np.asarray(gains[:, h.at] / ideal)


def _average_precision(h: Hits) -> Floats:
    ranks = np.arange(1, h.hits.shape[1] + 1)
    return np.asarray(np.cumsum(h.hits * h.found / ranks, axis=1)[:, h.at] / h.total[:, None])


METRICS.add("recall", lambda h: np.asarray(h.found[:, h.at] / h.total[:, None]))
METRICS.add("ndcg", _ndcg)
METRICS.add("mrr", lambda h: np.where(h.first <= h.at + 1, 1.0 / h.first, 0.0))
METRICS.add("hit_rate", lambda h: np.asarray(h.found[:, h.at] > 0))
METRICS.add("map", _average_precision)
METRICS.add("precision", lambda h: np.asarray(h.found[:, h.at] / h.cuts))


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
    return _one("recall", ranked, relevant_offsets, relevant_rows, k)


def ndcg_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query DCG over ideal DCG with gain 1 and discount log2(rank + 1): [Q] float64 in [0, 1].

    The ideal list has min(k, relevant items) hits, so that a perfect list scores 1 for every k.

    Source: Jarvelin and Kekalainen (2002), "Cumulated gain-based evaluation of IR techniques".
    """
    return _one("ndcg", ranked, relevant_offsets, relevant_rows, k)


def mrr_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query 1 / rank of the first relevant item, 0 where the top k has none: [Q] float64."""
    return _one("mrr", ranked, relevant_offsets, relevant_rows, k)


def hit_rate_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query 1 where a relevant item is in the top k, else 0: [Q] float64."""
    return _one("hit_rate", ranked, relevant_offsets, relevant_rows, k)


def average_precision_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query the precisions at the ranks of its hits in the top k over all relevant items.

    Their mean is MAP: [Q] float64 in [0, 1].

    Source: Buckley and Voorhees (2000), "Evaluating evaluation measure stability"; trec_eval's ``map_cut``.
    """
    return _one("map", ranked, relevant_offsets, relevant_rows, k)


def precision_at_k(ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    """Return per query the relevant items in the top k over k, also where a list is shorter: [Q] float64."""
    return _one("precision", ranked, relevant_offsets, relevant_rows, k)


def per_query(hits: NDArray[np.bool_], num_relevant: Ints, ks: Sequence[int]) -> Floats:
    """Return the metrics of ``METRICS`` by cut-off, [Q, metrics, cut-offs] float64.

    Args:
        hits: [Q, K] bool, of ``hit_matrix``.
        num_relevant: [Q] int64; 0 gives NaN.
        ks: cut-offs; ranks behind the K-th have no hit.
    """
    num_queries, width = hits.shape
    cuts = np.asarray(ks, dtype=np.int64)
    values = np.zeros((num_queries, len(METRICS.names), len(cuts)))
    if width:
        found = Hits(hits, np.maximum(num_relevant, 1), cuts)
        for i, metric in enumerate(METRICS):
            values[:, i] = metric(found)
    values[num_relevant == 0] = np.nan
    return values


def metric_names(ks: Sequence[int]) -> list[str]:
    """Return the names of what ``per_query`` measures, such as ``recall@10``, cut-offs changing fastest."""
    return [f"{name}@{k}" for name in METRICS.names for k in ks]


class MetricSums:
    """Sums of the metrics over queries; sums of parts add up to the sums of the whole.

    Args:
        ks: cut-offs, each at least 1.
    """

    def __init__(self, ks: Sequence[int]) -> None:
        if not ks or min(ks) < 1:
            raise ValueError(f"ks is {list(ks)}; give at least one cut-off, each at least 1")
        self.ks = sorted(set(int(k) for k in ks))
        self._sums = np.zeros((len(METRICS.names), len(self.ks)))
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
        self.add_hits(*hit_matrix(ranked, relevant_offsets, relevant_rows))

    def add_hits(self, hits: NDArray[np.bool_], num_relevant: Ints) -> Floats:
        """Add what ``hit_matrix`` found, and return the metrics by query [Q, metrics, cut-offs]."""
        values = per_query(hits, num_relevant, self.ks)
        counted = num_relevant > 0
        self._count += int(counted.sum())
        self._sums += values[counted].sum(axis=0)
        return values

    def state(self) -> Floats:
        """Return [1 + metrics * cut-offs] float64: the count and the sums. States of parts add up."""
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
        return dict(zip(metric_names(self.ks), (self._sums / count).ravel().tolist(), strict=True))


def _refuse_repeats(ranked: Ints) -> None:
    ordered = np.sort(ranked, axis=1)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if repeated.any():
        raise ValueError(f"list {int(repeated.argmax())} names an item twice; a ranking names each item once")


def _one(metric: str, ranked: Ints, relevant_offsets: Ints, relevant_rows: Ints, k: int) -> Floats:
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    values = per_query(*hit_matrix(ranked, relevant_offsets, relevant_rows), [k])
    return np.ascontiguousarray(values[:, METRICS.names.index(metric), 0])
