"""The best items of queries, and the merging of candidates: by score, then by item row, exactly.

A candidate is one unsigned integer whose ascending order is the order of the answer, so that lists of any
number of shards are merged by sorting integers.

Symbols: Q queries, K results, T candidates of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
KeyArray = npt.NDArray[np.uint64]

NOTHING = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""The key of no item; it comes after all others."""
_LOW = np.uint64(0xFFFF_FFFF)
_SIGN = np.uint32(0x8000_0000)


@dataclass(frozen=True)
class Hits:
    """The best items of one query, best first; equal scores by ascending item row."""

    item_rows: IntArray
    """[m] int64."""
    scores: FloatArray
    """[m] float32, inner products."""


def ranking_keys(scores: FloatArray, item_rows: IntArray) -> KeyArray:
    """Return keys whose ascending order is by descending score, then ascending item row.

    Args:
        scores: [...] float32, not NaN.
        item_rows: [...] int64 in [0, 2**32 - 1); -1 gives the key that comes after all others.
    """
    # Adding 0 turns -0.0 into 0.0; flipping all bits of negatives and the sign of others makes floats
    # sort as unsigned integers.
    bits = (scores + np.float32(0)).view(np.uint32)
    ascending = bits ^ np.where(bits & _SIGN, np.uint32(0xFFFF_FFFF), _SIGN)
    keys = ((~ascending).astype(np.uint64) << np.uint64(32)) | item_rows.astype(np.uint64) & _LOW
    keys[item_rows < 0] = NOTHING
    return keys


def best_keys(keys: KeyArray, k: int) -> KeyArray:
    """Return the K smallest keys of each row in ascending order, [Q, min(K, T)] of [Q, T]."""
    if keys.shape[1] > 4 * k:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    return np.sort(keys, axis=1)[:, :k]


def hits_of(keys: KeyArray) -> list[Hits]:
    """Return the hits of ordered keys [Q, K]; keys that stand for nothing are left out."""
    ascending = ~(keys >> np.uint64(32)).astype(np.uint32)
    bits = ascending ^ np.where(ascending & _SIGN, _SIGN, np.uint32(0xFFFF_FFFF))
    scores = bits.view(np.float32)
    rows = (keys & _LOW).astype(np.int64)
    counts = (keys != NOTHING).sum(axis=1)
    return [Hits(rows[q, :m], scores[q, :m]) for q, m in enumerate(counts.tolist())]


@dataclass(frozen=True)
class Excluded:
    """Item rows left out of each query, as sorted pairs of query and row."""

    pairs: IntArray
    """[e] int64, query << 32 | item row, ascending, without repeats."""

    @classmethod
    def of(cls, lists: Sequence[npt.ArrayLike]) -> Excluded:
        """Return the exclusions of one list of item rows for each query."""
        arrays = [np.asarray(rows, dtype=np.int64).reshape(-1) for rows in lists]
        queries = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])
        rows = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
        valid = (rows >= 0) & (rows < int(_LOW))
        pairs = (queries[valid] << 32) | rows[valid]
        # Seen sets come in order, and may be long.
        return cls(pairs if (pairs[1:] > pairs[:-1]).all() else np.unique(pairs))

    @property
    def item_rows(self) -> IntArray:
        """The row of each pair, [e] int64."""
        return self.pairs & int(_LOW)

    @property
    def queries(self) -> IntArray:
        """The query of each pair, [e] int64."""
        return self.pairs >> 32

    def contains(self, item_rows: IntArray) -> npt.NDArray[np.bool_]:
        """Return for item rows [Q, T] whether the query of that row leaves them out."""
        if len(self.pairs) == 0:
            return np.zeros(item_rows.shape, np.bool_)
        wanted = (np.arange(len(item_rows))[:, None] << 32) | item_rows
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        return np.asarray(self.pairs[at] == wanted)


def merged(scores: FloatArray, item_rows: IntArray, k: int) -> KeyArray:
    """Return the ordered keys of the best candidates of each query, [Q, min(K, T)].

    Args:
        scores: [Q, T] float32, of all shards one after the other.
        item_rows: [Q, T] int64, -1 where there is no candidate.
        k: K.
    """
    return best_keys(ranking_keys(scores, item_rows), k)


def in_order(scores: FloatArray, item_rows: IntArray, k: int) -> Hits:
    """Return the hits of one query whose candidates [T] come best first, -1 behind the last.

    It is what ``merged`` gives, at a fraction of its time: only equal scores may stand in the wrong order.
    """
    scores, item_rows = scores[:k], item_rows[:k]
    if len(item_rows) and item_rows[-1] < 0:
        found = item_rows >= 0
        scores, item_rows = scores[found], item_rows[found]
    if np.count_nonzero(scores[1:] >= scores[:-1]):  # any() takes three times as long
        order = np.lexsort((item_rows, -scores))
        scores, item_rows = scores[order], item_rows[order]
    return Hits(item_rows, scores)


def no_hits() -> Hits:
    """Return the hits of a query that found nothing."""
    return Hits(np.zeros(0, np.int64), np.zeros(0, np.float32))
