"""One searcher over any number of shards.

Every shard's candidates are merged exactly, ordered by score, then by item row. FAISS's -1 ends here. The
searcher holds no state of a call, so that threads can share it.

Symbols: Q queries, D embedding_dim, K results, S shards, N items, n items of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from twotower.errors import ArtefactError, RequestError
from twotower.index.build import check_item_rows
from twotower.index.spec import Effort
from twotower.index.units import Unit, units_of

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
KeyArray = npt.NDArray[np.uint64]

_NOTHING = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_LOW = np.uint64(0xFFFF_FFFF)
_SIGN = np.uint32(0x8000_0000)
_QUERY_BLOCK = 512
_DECODE_BLOCK = 32_768


@dataclass(frozen=True)
class Hits:
    """The best items of one query, best first; equal scores by ascending item row."""

    item_rows: IntArray
    """[m] int64."""
    scores: FloatArray
    """[m] float32, inner products."""


@dataclass(frozen=True)
class Shard:
    """A FAISS index and the item row of each of its labels."""

    index: Any
    """Inner-product index of n vectors."""
    item_rows: IntArray
    """[n] int64, ascending."""
    dead: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Item rows that are not answered from this shard, ascending; those of other shards may be among them."""


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
    keys[item_rows < 0] = _NOTHING
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
    counts = (keys != _NOTHING).sum(axis=1)
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
        return cls(np.unique((queries[valid] << 32) | rows[valid]))

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


class Searcher:
    """Top-k search over shards; may be shared by threads."""

    def __init__(self, shards: Sequence[Shard], effort: Effort | None = None, threads: int = 1) -> None:
        """Check the shards and make them ready.

        Args:
            shards: any number, also empty ones; an item row is alive in one of them at most.
            effort: how hard approximate indexes look.
            threads: FAISS threads of a call; set for the calling thread at each call.

        Raises:
            ArtefactError: the shards do not fit together.
        """
        dims = sorted({s.index.d for s in shards})
        if len(dims) > 1:
            raise ArtefactError(f"the shards have vectors of {dims} dimensions; all must be of one build")
        for number, shard in enumerate(shards):
            check_item_rows(shard.item_rows)
            if shard.index.ntotal != len(shard.item_rows):
                raise ArtefactError(
                    f"shard {number} has {shard.index.ntotal} vectors and {len(shard.item_rows)} item rows"
                )
        self.shards = [s for s in shards if len(s.item_rows)]
        self.dim = dims[0] if dims else 0
        self.units = units_of([(s.index, s.item_rows, s.dead) for s in self.shards])
        _check_disjoint(self.units)
        self.num_items = sum(len(u.item_rows) for u in self.units)
        self.effort = effort or Effort()
        self.threads = threads

    def search(
        self,
        queries: FloatArray,
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
        effort: Effort | None = None,
        complete: bool = True,
    ) -> list[Hits]:
        """Return the best items of each query.

        Args:
            queries: [Q, D] float32, finite.
            k: K, 1 or more. Fewer hits are returned only when fewer allowed items exist.
            exclude: for each query the item rows left out; rows that are in no shard are allowed.
            effort: replaces the searcher's own for this call.
            complete: search exactly for queries of which the index returns too few.

        Raises:
            RequestError: k or the queries are not as described.
        """
        queries = self._check(queries, k, exclude)
        if self.num_items == 0 or len(queries) == 0:
            return [_no_hits() for _ in queries]
        faiss.omp_set_num_threads(self.threads)
        effort = effort or self.effort
        if exclude is None or len(queries) <= _QUERY_BLOCK:
            return self._search_block(queries, k, exclude, effort, complete)
        # Each block fetches as much more as its longest list: like lengths go together.
        order = np.argsort([np.size(e) for e in exclude], kind="stable")
        hits: list[Hits] = [_no_hits()] * len(queries)
        for start in range(0, len(order), _QUERY_BLOCK):
            block = order[start : start + _QUERY_BLOCK]
            found = self._search_block(
                queries[block], k, [exclude[q] for q in block.tolist()], effort, complete
            )
            for q, h in zip(block.tolist(), found, strict=True):
                hits[q] = h
        return hits

    def search_exactly(
        self, queries: FloatArray, k: int, exclude: Sequence[npt.ArrayLike] | None = None
    ) -> list[Hits]:
        """Return the best items by the vectors that the indexes hold, each of which is scored."""
        queries = self._check(queries, k, exclude)
        excluded = Excluded.of(exclude) if exclude is not None else None
        return hits_of(_exact_keys(queries, k, self._decoded(), excluded))

    def vectors(self, item_rows: npt.ArrayLike) -> FloatArray:
        """Return the vectors of items as the indexes hold them (some round), [m, D] float32.

        Raises:
            RequestError: an item row is in no shard.
        """
        rows = np.asarray(item_rows, dtype=np.int64).reshape(-1)
        out = np.empty((len(rows), self.dim), np.float32)
        found = np.zeros(len(rows), np.bool_)
        for unit in self.units:
            there = unit.contains(rows)
            if there.any():
                out[there] = unit.vectors(rows[there])
                found |= there
        if not found.all():
            raise RequestError(f"item row {rows[np.argmin(found)]} is not in the index; use an indexed one")
        return out

    def contains(self, item_rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return [m] bool: whether each item row can be answered; dead ones and those of no shard can not."""
        rows = np.asarray(item_rows, dtype=np.int64).reshape(-1)
        found = np.zeros(len(rows), np.bool_)
        for unit in self.units:
            found |= unit.contains(rows)
        return found

    def _check(self, queries: FloatArray, k: int, exclude: Sequence[npt.ArrayLike] | None) -> FloatArray:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if k < 1:
            raise RequestError(f"k ({k}) must be at least 1")
        if queries.ndim != 2 or (self.num_items and queries.shape[1] != self.dim):
            raise RequestError(f"queries have shape {queries.shape}; it must be (number, {self.dim})")
        if not np.isfinite(queries).all():
            raise RequestError("a query holds NaN or infinity; check the features that it is made of")
        if exclude is not None and len(exclude) != len(queries):
            raise RequestError(f"{len(queries)} queries have {len(exclude)} exclude lists; give one each")
        return queries

    def _search_block(
        self,
        queries: FloatArray,
        k: int,
        exclude: Sequence[npt.ArrayLike] | None,
        effort: Effort,
        complete: bool,
    ) -> list[Hits]:
        excluded = Excluded.of(exclude) if exclude is not None else Excluded(np.zeros(0, np.int64))
        rows_out, query_of = excluded.item_rows, excluded.queries
        allowed = np.full(len(queries), self.num_items)
        found_scores, found_rows = [], []
        for unit in self.units:
            extra = 0
            if len(rows_out):
                left_out = np.bincount(query_of[unit.contains(rows_out)], minlength=len(queries))
                allowed -= left_out
                extra = int(left_out.max())
            scores, rows = unit.search(queries, min(k + extra, len(unit.item_rows)), effort)
            found_scores.append(scores)
            found_rows.append(rows)
        # One call over all shards: NumPy's cost for each call is most of the time of a single query.
        rows = np.concatenate(found_rows, axis=1)
        if len(rows_out):
            rows[excluded.contains(rows)] = -1
        keys = best_keys(ranking_keys(np.concatenate(found_scores, axis=1), rows), k)
        # An approximate index may return fewer than were asked for.
        short = (keys != _NOTHING).sum(axis=1) < np.minimum(k, allowed)
        hits = hits_of(keys)
        if complete and short.any():
            at = np.flatnonzero(short)
            lists = [exclude[q] for q in at.tolist()] if exclude is not None else None
            for q, h in zip(at.tolist(), self.search_exactly(queries[at], k, lists), strict=True):
                hits[q] = h
        return hits

    def _decoded(self) -> Iterator[tuple[IntArray, FloatArray]]:
        for unit in self.units:
            for start in range(0, len(unit.item_rows), _DECODE_BLOCK):
                rows = unit.item_rows[start : start + _DECODE_BLOCK]
                yield rows, unit.vectors(rows)


def exact_top_k(queries: FloatArray, k: int, blocks: Iterator[tuple[IntArray, FloatArray]]) -> list[Hits]:
    """Return the best items of each query [Q, D] over blocks of (item_rows [n], vectors [n, D])."""
    return hits_of(_exact_keys(queries, k, blocks, None))


def _exact_keys(
    queries: FloatArray, k: int, blocks: Iterator[tuple[IntArray, FloatArray]], excluded: Excluded | None
) -> KeyArray:
    best: KeyArray = np.zeros((len(queries), 0), np.uint64)
    for item_rows, vectors in blocks:
        scores = queries @ vectors.T
        rows = np.broadcast_to(np.asarray(item_rows), scores.shape).copy()
        if excluded is not None:
            rows[excluded.contains(rows)] = -1
        best = best_keys(np.concatenate([best, ranking_keys(scores, rows)], axis=1), k)
    return best


def _check_disjoint(units: Sequence[Unit]) -> None:
    rows = np.sort(np.concatenate([u.item_rows for u in units])) if units else np.zeros(0, np.int64)
    repeated = rows[1:] == rows[:-1]
    if repeated.any():
        raise ArtefactError(f"item row {rows[1:][repeated][0]} is in two shards; build the generation again")


def _no_hits() -> Hits:
    return Hits(np.zeros(0, np.int64), np.zeros(0, np.float32))
