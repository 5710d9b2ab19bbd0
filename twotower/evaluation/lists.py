"""What recommended lists look like together, whatever is relevant: how much of the catalogue, how popular.

Sums of parts add up to those of the whole. Means are over the lists that have an item (for diversity: two).
Legend: Q lists, K columns of a list, k cut-off, N catalogue items, V values of attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[np.generic]]

TOP_LIST_LENGTH = 10
"""Length of the lists that ``share_same_top10`` compares."""


@dataclass(frozen=True)
class ItemFacts:
    """What is known of the catalogue beside the lists."""

    counts: Ints
    """[N] int64, positives of each item in train and validation."""
    num_users: int
    """Users with a positive in train or validation."""
    attributes: sparse.csr_matrix | None = None
    """[N, V] float64 rows of length 1, or 0 without a value; None where items have no attributes."""


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


def gini(counts: Ints) -> float:
    """Return the Gini coefficient of counts [N]: 0 where all are equal, 1 - 1/N where one has all.

    Source: the mean absolute difference over twice the mean, from sorted values.
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    total, count = ordered.sum(), len(ordered)
    if not total:
        return float("nan")
    ranks = 2.0 * np.arange(1, count + 1) - count - 1
    return float((ranks * ordered).sum() / (count * total))


class ListStats:
    """Coverage, Gini, popularity, novelty and diversity of lists by cut-off, and how many are the same.

    Without ``facts`` there are coverage, Gini and the same lists only.

    Args:
        num_items: catalogue items N.
        ks: cut-offs.
        facts: of the items.
    """

    def __init__(self, num_items: int, ks: Sequence[int], facts: ItemFacts | None = None) -> None:
        self.num_items = num_items
        self.ks = sorted(set(int(k) for k in ks))
        self.shown = np.zeros((len(self.ks), num_items), dtype=np.int64)
        self._digests: list[NDArray[np.uint64]] = []
        self._facts = facts
        # Sums and counts of mean_popularity, novelty and diversity.
        self._sums = np.zeros((3, 2, len(self.ks)))
        if facts is not None:
            # An item that nobody took counts as taken once, so that it is finite.
            share = np.maximum(facts.counts, 1) / max(facts.num_users, 1)
            self._information = -np.log2(np.minimum(share, 1.0))

    def add(self, ranked: Ints) -> None:
        """Add lists [Q, K] int64, best first, -1 padded."""
        ranked = np.asarray(ranked, dtype=np.int64)
        if ranked.max(initial=-1) >= self.num_items:
            raise ValueError(
                f"ranked names item row {ranked.max()}; the catalogue has {self.num_items} items"
            )
        for row, k in enumerate(self.ks):
            top = ranked[:, :k]
            self.shown[row] += np.bincount(top[top >= 0], minlength=self.num_items)
        self._digests.append(_digest(ranked[:, :TOP_LIST_LENGTH]))
        if self._facts is not None and len(ranked) and self.num_items:
            self._add_facts(ranked, self._facts)

    def _add_facts(self, ranked: Ints, facts: ItemFacts) -> None:
        for column, k in enumerate(self.ks):
            top = ranked[:, :k]
            there = top >= 0
            length = there.sum(axis=1)
            some = length > 0
            for row, values in enumerate((facts.counts, self._information)):
                means = np.where(there, values[top], 0.0).sum(axis=1)[some] / length[some]
                self._sums[row, :, column] += means.sum(), some.sum()
            if facts.attributes is not None:
                distances = _distances(top, there, length, facts.attributes)
                self._sums[2, :, column] += distances.sum(), len(distances)

    def state(self) -> Arrays:
        """Return what ``merge`` takes: the items that were shown, 8 bytes a list, and a few sums."""
        rows, items = np.nonzero(self.shown)
        return {
            "shown_at": (rows * self.num_items + items).astype(np.int64),
            "shown": self.shown[rows, items],
            "digests": self._all_digests(),
            "facts": self._sums,
        }

    def merge(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Add the state of another part with the same catalogue and cut-offs."""
        places, sums = np.asarray(state["shown_at"]), np.asarray(state["facts"])
        if sums.shape != self._sums.shape or places.max(initial=-1) >= self.shown.size:
            raise ValueError(
                f"the state is of other lists; this one has {self.num_items} items and cut-offs {self.ks}"
            )
        self.shown.reshape(-1)[places] += np.asarray(state["shown"], dtype=np.int64)
        self._digests.append(np.asarray(state["digests"], dtype=np.uint64))
        self._sums += sums

    def result(self) -> dict[str, float]:
        """Return the numbers by name, such as ``coverage@10``; NaN without items or lists."""
        found: dict[str, float] = {}
        for k, shown in zip(self.ks, self.shown, strict=True):
            found[f"coverage@{k}"] = float((shown > 0).mean()) if self.num_items else float("nan")
        found |= {f"gini@{k}": gini(shown) for k, shown in zip(self.ks, self.shown, strict=True)}
        if self._facts is not None:
            names = ["mean_popularity", "novelty"] + ["diversity"] * (self._facts.attributes is not None)
            for row, name in enumerate(names):
                for column, k in enumerate(self.ks):
                    total, count = self._sums[row, :, column]
                    found[f"{name}@{k}"] = float(total / count) if count else float("nan")
        digests = self._all_digests()
        counts = np.unique(digests, return_counts=True)[1]
        found["same_top10"] = float(counts.max() / len(digests)) if len(digests) else float("nan")
        return found

    def _all_digests(self) -> NDArray[np.uint64]:
        return np.concatenate([np.empty(0, dtype=np.uint64), *self._digests])


class Overlap:
    """How much of their top ten lists two queries share on average, before anything is masked.

    A model that gives everybody the same answer has 1 here, while its masked lists differ by what each user
    has had.
    """

    def __init__(self, num_items: int) -> None:
        """Take the catalogue's number of items N."""
        self._shown = np.zeros(num_items, dtype=np.int64)
        self._lists = 0

    def add(self, ranked: Ints) -> None:
        """Add lists [Q, K] int64, -1 padded, of which the first ten columns count."""
        top = np.asarray(ranked)[:, :TOP_LIST_LENGTH]
        self._shown += np.bincount(top[top >= 0], minlength=len(self._shown))
        self._lists += len(top)

    def state(self) -> Arrays:
        """Return what ``merge`` takes."""
        items = np.flatnonzero(self._shown)
        return {"items": items, "shown": self._shown[items], "lists": np.array([self._lists])}

    def merge(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Add the state of other queries."""
        self._shown[np.asarray(state["items"], dtype=np.int64)] += np.asarray(state["shown"], dtype=np.int64)
        self._lists += int(np.asarray(state["lists"])[0])

    def result(self) -> float:
        """Return the mean over pairs of queries of common items over a list's length; NaN under two."""
        width = min(TOP_LIST_LENGTH, len(self._shown))
        pairs = self._lists * (self._lists - 1)
        if not pairs or not width:
            return float("nan")
        shown = self._shown.astype(np.float64)
        return float((shown * (shown - 1)).sum() / pairs / width)


def _distances(top: Ints, there: NDArray[np.bool_], length: Ints, attributes: sparse.csr_matrix) -> Floats:
    """The mean distance 1 - cosine of the pairs of each list of two or more items.

    Source: Ziegler, McNee, Konstan and Lausen (2005), "Improving recommendation lists through topic
    diversification". The cosines of all pairs of unit vectors add up to the squared length of their sum.
    """
    indptr = np.concatenate([[0], np.cumsum(length)])
    chosen = sparse.csr_matrix(
        (np.ones(indptr[-1]), top[there], indptr), shape=(len(top), attributes.shape[0])
    )
    summed = chosen @ attributes
    own = chosen @ np.asarray(attributes.multiply(attributes).sum(axis=1)).ravel()
    squared = np.asarray(summed.multiply(summed).sum(axis=1)).ravel()
    several = length > 1
    pairs = (length * (length - 1))[several]
    distances: Floats = 1.0 - (squared - own)[several] / pairs
    return distances


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
