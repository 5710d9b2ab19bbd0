"""One searcher over any number of shards.

Every shard's candidates are merged exactly, ordered by score, then by item row. FAISS's -1 ends here. The
searcher holds no state of a call, so that threads can share it.

A search among some of the items goes one of three ways (``filter_plan``): their vectors are gathered and
scored, FAISS passes over the others while it scans, or more is fetched and the others are dropped. A query
that comes out short of items that there are is searched again, at the greatest effort, and then exactly.

Symbols: Q queries, D embedding_dim, K results, S shards, N items, n items of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from twotower.errors import ArtefactError, RequestError
from twotower.index.allowed import Allowed
from twotower.index.build import check_item_rows
from twotower.index.filter_plan import FilterPlan, Strategy, unmeasured
from twotower.index.gpu import Gpu, gpus, placed
from twotower.index.hits import (
    Excluded,
    FloatArray,
    Hits,
    IntArray,
    KeyArray,
    best_keys,
    hits_of,
    in_order,
    merged,
    no_hits,
    ranking_keys,
)
from twotower.index.spec import Effort, efforts
from twotower.index.units import Unit

__all__ = ["Hits", "Searcher", "Shard", "best_keys", "exact_top_k", "hits_of", "ranking_keys"]

_QUERY_BLOCK = 512
_DECODE_BLOCK = 32_768
_LONG_LIST = 1_000
"""Excluded items of one query from which they become bits."""
_NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Shard:
    """A FAISS index and the item row of each of its labels."""

    index: Any
    """Inner-product index of n vectors."""
    item_rows: IntArray
    """[n] int64, ascending."""
    dead: IntArray = field(default_factory=lambda: _NO_ROWS)
    """Item rows that are not answered from this shard, ascending; those of other shards may be among them."""


class Searcher:
    """Top-k search over shards; may be shared by threads."""

    def __init__(
        self,
        shards: Sequence[Shard],
        effort: Effort | None = None,
        threads: int = 1,
        plan: FilterPlan | None = None,
        on: Sequence[Gpu] | None = None,
    ) -> None:
        """Check the shards and make them ready.

        Args:
            shards: any number, also empty ones; an item row is alive in one of them at most.
            effort: how hard approximate indexes look.
            threads: FAISS threads of a call; set for the calling thread at each call.
            plan: how to search among some of the items, as measured on these shards.
            on: GPUs that hold copies of the shards; all of this machine when not given.

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
        on = gpus() if on is None else on
        self.units = placed([(s.index, s.item_rows, s.dead) for s in self.shards], on)
        # Each GPU works for a thread of its own; one is asked by the caller's.
        self._pool = ThreadPoolExecutor(len(on), "gpu") if len(on) > 1 and len(self.units) > 1 else None
        _check_disjoint(self.units)
        self.num_items = sum(len(u.item_rows) for u in self.units)
        self.effort = effort or Effort()
        self.threads = threads
        self.plan = plan

    @property
    def num_rows(self) -> int:
        """One more than the greatest item row that can be answered."""
        return max((int(u.item_rows[-1]) + 1 for u in self.units), default=0)

    def search(
        self,
        queries: FloatArray,
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
        effort: Effort | None = None,
        complete: bool = True,
        allowed: Allowed | None = None,
        strategy: Strategy | None = None,
    ) -> list[Hits]:
        """Return the best items of each query.

        Args:
            queries: [Q, D] float32, finite.
            k: K, 1 or more. Fewer hits are returned only when fewer allowed items exist.
            exclude: for each query the item rows left out; rows that are in no shard are allowed.
            effort: replaces the searcher's own, or the plan's, for this call.
            complete: search further for queries of which the index returns too few.
            allowed: item rows that may be answered to all of these queries; all when not given.
            strategy: how to search among them; the plan's choice when not given.

        Raises:
            RequestError: k or the queries are not as described.
        """
        queries = self._check(queries, k, exclude)
        if self.num_items == 0 or len(queries) == 0:
            return [no_hits() for _ in queries]
        faiss.omp_set_num_threads(self.threads)
        by_selector = True
        if allowed is not None:
            count = allowed.count
            if count == 0:
                return [no_hits() for _ in queries]
            planned = self.plan.choose(count, self.num_items, k) if self.plan else None
            if planned is None:
                planned = unmeasured(count, self.num_items, self.effort)
            strategy = strategy or planned.strategy
            if strategy == "gather":
                return self._gather(queries, k, exclude, allowed)
            by_selector = strategy == "selector"
            effort = effort or self._filtered_effort(strategy, planned.strategy, planned.effort)
        return self._find_all(queries, k, exclude, effort or self.effort, complete, allowed, by_selector)

    def search_exactly(
        self,
        queries: FloatArray,
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
        allowed: Allowed | None = None,
    ) -> list[Hits]:
        """Return the best items by the vectors that the indexes hold, each of which is scored.

        Inverted lists are scanned as a whole, at a fraction of the time of decoding their vectors.
        """
        queries = self._check(queries, k, exclude)
        whole = {unit.exhaustive for unit in self.units}
        # Lists of different numbers need the effort of the longest.
        effort = max((e for e in whole if e is not None), key=lambda e: e.nprobe, default=None)
        if None in whole or effort is None:
            return self._gather(queries, k, exclude, allowed)
        return self._find_all(queries, k, exclude, effort, False, allowed, True)

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

    def efforts(self) -> list[Effort]:
        """Return the efforts worth trying on these shards, from the least to the most."""
        tried = max((efforts(u.index) for u in self.units), key=len, default=[])
        return tried or [Effort()]

    def _check(self, queries: FloatArray, k: int, exclude: Sequence[npt.ArrayLike] | None) -> FloatArray:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if k < 1:
            raise RequestError(f"k ({k}) must be at least 1")
        if queries.ndim != 2 or (self.num_items and queries.shape[1] != self.dim):
            raise RequestError(f"queries have shape {queries.shape}; it must be (number, {self.dim})")
        # One product says so of most at half the time; large finite numbers can overflow in it.
        if not math.isfinite(np.vdot(queries, queries)) and not np.isfinite(queries).all():
            raise RequestError("a query holds NaN or infinity; check the features that it is made of")
        if exclude is not None and len(exclude) != len(queries):
            raise RequestError(f"{len(queries)} queries have {len(exclude)} exclude lists; give one each")
        return queries

    def _filtered_effort(self, strategy: Strategy, planned: Strategy, effort: Effort) -> Effort:
        """Return the planned effort, or the greatest for a strategy that the plan did not choose."""
        return effort if strategy == planned else self.efforts()[-1]

    def _find_all(
        self,
        queries: FloatArray,
        k: int,
        exclude: Sequence[npt.ArrayLike] | None,
        effort: Effort,
        complete: bool,
        allowed: Allowed | None,
        by_selector: bool,
    ) -> list[Hits]:
        """Search in blocks of queries that fetch alike; a query with a long list is searched by itself."""
        if exclude is None or (len(queries) == 1 and np.size(exclude[0]) <= _LONG_LIST):
            return self._search_block(queries, k, exclude, effort, complete, allowed, by_selector)
        hits: list[Hits] = [no_hits()] * len(queries)
        lengths = np.array([np.size(e) for e in exclude])
        for q in np.flatnonzero(lengths > _LONG_LIST).tolist():
            hits[q] = self._search_rest(queries[q : q + 1], k, exclude[q], effort, complete, allowed)
        few = np.flatnonzero(lengths <= _LONG_LIST)
        for block in _alike(k + lengths[few]):
            places = few[block]
            lists = [exclude[q] for q in places.tolist()]
            found = self._search_block(queries[places], k, lists, effort, complete, allowed, by_selector)
            for q, h in zip(places.tolist(), found, strict=True):
                hits[q] = h
        return hits

    def _search_rest(
        self,
        query: FloatArray,
        k: int,
        out: npt.ArrayLike,
        effort: Effort,
        complete: bool,
        allowed: Allowed | None,
    ) -> Hits:
        """Search one query among all but many items: bits cost less than fetching as many more."""
        before = self.num_items if allowed is None else allowed.count
        rest = Allowed.all_but(out, self.num_rows if allowed is None else allowed.num_rows)
        if allowed is not None:
            rest &= allowed
        left = sum(unit.num_allowed(rest) for unit in self.units)
        if left == 0:
            return no_hits()
        if 2 * left < before:
            # An approximate search has to look the harder the fewer are left, as among those of a filter.
            harder = unmeasured(left, before, effort)
            if harder.strategy == "gather":
                return self._gather(query, k, None, rest)[0]
            effort = harder.effort
        return self._search_block(query, k, None, effort, complete, rest, True)[0]

    def _search_block(
        self,
        queries: FloatArray,
        k: int,
        exclude: Sequence[npt.ArrayLike] | None,
        effort: Effort,
        complete: bool,
        allowed: Allowed | None,
        by_selector: bool,
    ) -> list[Hits]:
        if len(queries) == 1 and self._pool is None:
            hits_of_one = self._find_one(queries, k, exclude, effort, allowed, by_selector)
            if hits_of_one is not None:
                return [hits_of_one]
        excluded = Excluded.of(exclude) if exclude is not None else None
        hits, short = self._find(queries, k, excluded, effort, allowed, by_selector)
        if not complete or not len(short):
            return hits
        # An approximate index may return fewer than were asked for: first it looks everywhere it can.
        for last in (False, True):
            lists = None if exclude is None else [exclude[q] for q in short.tolist()]
            if last:
                found, still = self._gather(queries[short], k, lists, allowed), short[:0]
            else:
                again = Excluded.of(lists) if lists is not None else None
                most = self.efforts()[-1]
                found, still = self._find(queries[short], k, again, most, allowed, by_selector)
            for q, h in zip(short.tolist(), found, strict=True):
                hits[q] = h
            short = short[still]
            if not len(short):
                break
        return hits

    def _find_one(
        self,
        query: FloatArray,
        k: int,
        exclude: Sequence[npt.ArrayLike] | None,
        effort: Effort,
        allowed: Allowed | None,
        by_selector: bool,
    ) -> Hits | None:
        """Return what ``_find`` does, for one query, in a third of its time; None when short."""
        out = _NO_ROWS if exclude is None else np.asarray(exclude[0], dtype=np.int64).reshape(-1)
        fetch = k + len(out)
        found = [
            unit.search(query, min(fetch, len(unit.item_rows)), effort, allowed, by_selector)
            for unit in self.units
        ]
        scores, rows = found[0][0][0], found[0][1][0]
        if len(found) > 1:
            scores = np.concatenate([f[0][0] for f in found])
            rows = np.concatenate([f[1][0] for f in found])
        if len(out):
            # NumPy's isin takes several times as long for so few.
            ordered = np.sort(out)
            at = np.minimum(np.searchsorted(ordered, rows), len(ordered) - 1)
            kept = ordered[at] != rows
            scores, rows = scores[kept], rows[kept]
        if len(found) > 1:
            # What was not found has the least score there is.
            order = np.lexsort((rows, -scores))
            scores, rows = scores[order], rows[order]
        hits = in_order(scores, rows, k)
        return hits if len(hits.item_rows) == k else None

    def _find(
        self,
        queries: FloatArray,
        k: int,
        excluded: Excluded | None,
        effort: Effort,
        allowed: Allowed | None,
        by_selector: bool,
    ) -> tuple[list[Hits], IntArray]:
        """Return what the indexes find, and which queries are short of items that there are."""
        wanted = np.full(len(queries), self.num_items)
        fetches = []
        for unit in self.units:
            extra = 0
            if excluded is not None and len(excluded.pairs):
                left_out = np.bincount(
                    excluded.queries[unit.contains(excluded.item_rows)], minlength=len(queries)
                )
                wanted -= left_out
                extra = int(left_out.max())
            fetches.append(min(k + extra, len(unit.item_rows)))

        def ask(unit: Unit, fetch: int) -> tuple[FloatArray, IntArray]:
            # Of the thread that asks: what a GPU can not do falls to the CPU.
            faiss.omp_set_num_threads(self.threads)
            return unit.search(queries, fetch, effort, allowed, by_selector)

        each: Callable[..., Iterable[tuple[FloatArray, IntArray]]] = self._pool.map if self._pool else map
        found = list(each(ask, self.units, fetches))
        found_scores, found_rows = [f[0] for f in found], [f[1] for f in found]
        # One call over all shards: NumPy's cost for each call is most of the time of a single query.
        scores = found_scores[0] if len(found_scores) == 1 else np.concatenate(found_scores, axis=1)
        rows = found_rows[0] if len(found_rows) == 1 else np.concatenate(found_rows, axis=1)
        if excluded is not None and len(excluded.pairs):
            rows[excluded.contains(rows)] = -1
        hits = hits_of(merged(scores, rows, k))
        counts = np.array([len(h.item_rows) for h in hits])
        short = np.flatnonzero(counts < np.minimum(k, wanted))
        if allowed is not None and len(short):
            short = short[counts[short] < np.minimum(k, self._num_wanted(allowed, excluded, short))]
        return hits, short

    def _num_wanted(self, allowed: Allowed, excluded: Excluded | None, queries: IntArray) -> IntArray:
        """Return how many items can be answered to some of the queries."""
        total = sum(unit.num_allowed(allowed) for unit in self.units)
        wanted = np.full(len(queries), total)
        if excluded is not None and len(excluded.pairs):
            rows = excluded.item_rows
            inside = allowed.contains(rows) & self.contains(rows)
            left_out = np.bincount(excluded.queries[inside], minlength=int(queries.max()) + 1)
            wanted -= left_out[queries]
        return wanted

    def _gather(
        self,
        queries: FloatArray,
        k: int,
        exclude: Sequence[npt.ArrayLike] | None,
        allowed: Allowed | None,
    ) -> list[Hits]:
        """Score the vectors of all items that are allowed."""
        excluded = Excluded.of(exclude) if exclude is not None else None
        return hits_of(_exact_keys(queries, k, self._decoded(allowed), excluded))

    def _decoded(self, allowed: Allowed | None) -> Iterator[tuple[IntArray, FloatArray]]:
        some = None if allowed is None else allowed.rows()
        for unit in self.units:
            rows = unit.item_rows if some is None else some[unit.contains(some)]
            for start in range(0, len(rows), _DECODE_BLOCK):
                block = rows[start : start + _DECODE_BLOCK]
                yield block, unit.vectors(block)


def _alike(fetches: IntArray) -> Iterator[IntArray]:
    """Yield the places of queries in blocks, since all of a block fetch as many items as its greatest does.

    Args:
        fetches: [Q] int64, how many each has to fetch; a block has none above twice its least.
    """
    order = np.argsort(fetches, kind="stable")
    ordered = fetches[order]
    start = 0
    while start < len(order):
        end = int(np.searchsorted(ordered, 2 * ordered[start], side="right"))
        yield order[start : min(end, start + _QUERY_BLOCK)]
        start = min(end, start + _QUERY_BLOCK)


def exact_top_k(queries: FloatArray, k: int, blocks: Iterable[tuple[IntArray, FloatArray]]) -> list[Hits]:
    """Return the best items of each query [Q, D] over blocks of (item_rows [n], vectors [n, D])."""
    return hits_of(_exact_keys(queries, k, blocks, None))


def _exact_keys(
    queries: FloatArray, k: int, blocks: Iterable[tuple[IntArray, FloatArray]], excluded: Excluded | None
) -> KeyArray:
    best: KeyArray = np.zeros((len(queries), 0), np.uint64)
    for item_rows, vectors in blocks:
        scores = queries @ vectors.T
        rows = np.broadcast_to(np.asarray(item_rows), scores.shape)
        if excluded is not None:
            rows = np.where(excluded.contains(rows), -1, rows)
        best = best_keys(np.concatenate([best, ranking_keys(scores, rows)], axis=1), k)
    return best


def _check_disjoint(units: Sequence[Unit]) -> None:
    rows = np.sort(np.concatenate([u.item_rows for u in units])) if units else np.zeros(0, np.int64)
    repeated = rows[1:] == rows[:-1]
    if repeated.any():
        raise ArtefactError(f"item row {rows[1:][repeated][0]} is in two shards; build the generation again")
