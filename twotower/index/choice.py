"""From what a configuration asks of an index to a FAISS factory string, with the reason.

================  =====================  =========================================================
kind              factory string         bytes of an item
================  =====================  =========================================================
``flat``          ``Flat``               4 D: exact
``hnsw``          ``HNSW32,Flat``        4 D + 272: a graph
``ivf_flat``      ``IVFn,Flat``          4 D + 8: inverted lists
``ivf_sq8``       ``IVFn,SQ8``           D + 8: a number in 8 bits; 98 % of the top 100 at most
``ivf_pq``        ``IVFn,PQ(D/2)``       D/2 + 8: two numbers in 8 bits; 92 % at most, slow to train
``ivf_fastscan``  ``IVFn,PQ(D/2)x4fs,    5 D/4 + 8: short codes are scanned, 8-bit ones refine what is
                  Refine(SQ8)``          found
``cagra``         ``CAGRA``              4 D + 272: a graph, built on a GPU and searched there or on a CPU
================  =====================  =========================================================

n is the power of two next to 4 sqrt(N), which FAISS's guidelines name the least for large N, and no more than
gives each list 39 vectors to train it. The shares were measured on low-rank clustered vectors of 128
dimensions.

``auto`` takes the first line that applies:

===========================================  ============  ================================================
catalogue                                    kind          measured with 2 cores, 128 dimensions
===========================================  ============  ================================================
up to 20,000 items                           ``flat``      20,000 items: 0.24 ms a query
up to 40,000, if items are updated or        ``flat``      100,000 items: 1.9 ms (``ivf_sq8`` 0.12 ms); in
filtered (``updates``, ``attributes``)                     return nothing lowers the recall of either
8-bit codes within ``max_memory_gib``        ``ivf_sq8``   1M items: 0.2 to 0.3 ms at index recall 0.95 of
                                                           the top 100, built in 34 s (Flat 22 ms;
                                                           HNSW16,SQ8 0.8 ms at 0.93, built in 100 s)
half of that within it                       ``ivf_pq``    may find too little for the target: then
                                                           publishing is refused
===========================================  ============  ================================================

A graph is never chosen, only named: it was slower at the same recall, took longer to build, and gets slower
still as items are deleted or filtered out, which inverted lists pass over while they are scanned.

Symbols: N items, D embedding_dim, S shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from twotower.config.index_kinds import INDEX_KINDS, num_lists
from twotower.config.service import IndexConfig
from twotower.errors import ConfigError

FLAT_ITEMS = 20_000
"""Most items that auto searches exactly: about 0.25 ms a query at 128 dimensions on one core."""
FLAT_ITEMS_CHANGING = 40_000
"""The same where items are updated or filtered, which no exact search finds less for."""

_ROW_BYTES = 17
"""Bytes of an item beside its code in an open searcher: its row, whether it is alive, where its code is."""
_GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """What the shards are built as."""

    factory: str
    """FAISS factory string."""
    reason: str
    """Why, in a sentence."""


def choose(index: IndexConfig, num_items: int, dim: int) -> Choice:
    """Return the factory string of a catalogue's shards.

    Args:
        index: its kind or factory, memory budget, and whether updates and filters are to come.
        num_items: N.
        dim: D.

    Raises:
        ConfigError: the kind that is named, or every kind that auto knows, takes more than the memory budget.
    """
    if index.factory is not None:
        return Choice(index.factory, "index.factory names it")
    budget = math.inf if index.max_memory_gib is None else index.max_memory_gib * _GIB
    if index.kind != "auto":
        taken = memory_bytes(index.kind, num_items, dim)
        if taken > budget:
            raise ConfigError(
                f"index.kind {index.kind} of {num_items:,} items of {dim} dimensions takes about "
                f"{_gib(taken)}, index.max_memory_gib allows {index.max_memory_gib:g}; allow more, or let "
                "index.kind: auto choose"
            )
        return Choice(factory_of(index.kind, num_items, dim), f"index.kind is {index.kind}")
    changing = index.updates or bool(index.attributes)
    exact = num_items <= (FLAT_ITEMS_CHANGING if changing else FLAT_ITEMS)
    kinds = ["flat", "ivf_sq8", "ivf_pq"] if exact else ["ivf_sq8", "ivf_pq"]
    needed = {kind: memory_bytes(kind, num_items, dim) for kind in kinds}
    fitting = [kind for kind in kinds if needed[kind] <= budget]
    if not fitting:
        least = min(needed.values())
        raise ConfigError(
            f"{num_items:,} items of {dim} dimensions take {_gib(least)} in the smallest index, "
            f"index.max_memory_gib allows {index.max_memory_gib:g}; allow more, or lower model.embedding_dim"
        )
    kind = fitting[0]
    reason = _REASONS[kind].format(num_items=num_items)
    if changing:
        reason += _CHANGING[kind == "flat"]
    if kind != kinds[0]:
        reason += (
            f"; {kinds[0]} would take {_gib(needed[kinds[0]])}, index.max_memory_gib allows "
            f"{index.max_memory_gib:g}"
        )
    return Choice(factory_of(kind, num_items, dim), reason)


_REASONS = {
    "flat": "{num_items:,} items are searched exactly in less than a millisecond",
    "ivf_sq8": (
        "{num_items:,} items are too many to search exactly; inverted lists of 8-bit codes are the fastest "
        "at a given recall, build quickly"
    ),
    "ivf_pq": (
        "{num_items:,} items are too many to search exactly; product codes in inverted lists are the smallest"
    ),
}
_CHANGING = {
    True: ", and no update or filter lowers what is found",
    False: ", and pass over items that are deleted or filtered out",
}


def num_shards(index: IndexConfig, num_items: int) -> int:
    """Return the number of shards of N items, S."""
    if index.shard_items is None:
        return index.num_shards
    return max(1, -(-num_items // index.shard_items))


def factory_of(kind: str, num_items: int, dim: int) -> str:
    """Return the factory string of a kind other than auto, for N items of D dimensions."""
    return INDEX_KINDS[kind].factory(num_items, dim)


def memory_bytes(kind: str, num_items: int, dim: int) -> int:
    """Return about how many bytes an open searcher takes for N items of D dimensions, in a kind of index."""
    index = INDEX_KINDS[kind]
    centroids = 4 * dim * num_lists(num_items) if index.has_lists else 0
    return num_items * (index.code_bytes(dim) + _ROW_BYTES) + centroids


def finds_more(factory: str) -> str:
    """Return what to do about an index that finds too little at its greatest effort, a sentence."""
    if "SQ" in factory or "PQ" in factory:
        return (
            "Its codes are rounded: index.kind ivf_flat or hnsw keep whole vectors, flat is exact; or lower "
            "index.target_index_recall."
        )
    return "index.kind: flat is exact; or lower index.target_index_recall."


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.3g} GiB"
