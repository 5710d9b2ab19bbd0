"""From what a configuration asks of an index to a FAISS factory string, with the reason.

============  =======================================================================
kind          factory string of each shard
============  =======================================================================
``flat``      ``Flat``: exact
``hnsw``      ``HNSW32,Flat``
``ivf_flat``  ``IVFn,Flat``
``ivf_sq8``   ``IVFn,SQ8``: a quarter of the memory, the fastest measured from 20,000 items on
``ivf_pq``    ``IVFn,PQ(D/2)x4fs,RFlat``
============  =======================================================================

n is the power of two next to 4 sqrt(N), which FAISS's guidelines name the least for large N, and no more than
gives each list 39 vectors to train it.

Symbols: N items, D embedding_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from twotower.config.service import IndexConfig

FLAT_ITEMS = 20_000
"""Most items that auto searches exactly: about 0.25 ms a query at 128 dimensions on one core."""

_POINTS_PER_LIST = 39


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
        index: its kind or factory.
        num_items: N.
        dim: D.
    """
    if index.factory is not None:
        return Choice(index.factory, "index.factory names it")
    kind, reason = index.kind, f"index.kind is {index.kind}"
    if kind == "auto":
        kind = "flat" if num_items <= FLAT_ITEMS else "ivf_sq8"
        reason = (
            f"{num_items:,} items are searched exactly in well under a millisecond"
            if kind == "flat"
            else f"{num_items:,} items are too many to search exactly; inverted lists of 8-bit codes are the "
            "fastest at a given recall, and build quickly"
        )
    lists = _lists(num_items)
    factories = {
        "flat": "Flat",
        "hnsw": "HNSW32,Flat",
        "ivf_flat": f"IVF{lists},Flat",
        "ivf_sq8": f"IVF{lists},SQ8",
        "ivf_pq": f"IVF{lists},PQ{max(dim // 2, 1)}x4fs,RFlat",
    }
    return Choice(factories[kind], reason)


def _lists(num_items: int) -> int:
    wanted: int = 2 ** round(math.log2(4 * math.sqrt(max(num_items, 1))))
    return max(1, min(int(wanted), num_items // _POINTS_PER_LIST))
