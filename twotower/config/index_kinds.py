"""The kinds of ``index.kind``: what FAISS builds of each, and how much memory it takes.

Symbols: N items, D embedding_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from twotower.registry import Registry

_POINTS_PER_LIST = 39


@dataclass(frozen=True)
class IndexKind:
    """A kind of index."""

    factory: Callable[[int, int], str]
    """Of N and D the FAISS factory string."""
    code_bytes: Callable[[int], int]
    """Of D the bytes that an item takes in an open index, beside its row."""
    has_lists: bool = False
    """Whether it has inverted lists, whose centroids take memory too."""


def num_lists(num_items: int) -> int:
    """Return how many inverted lists N items are put into."""
    wanted: int = 2 ** round(math.log2(4 * math.sqrt(max(num_items, 1))))
    return max(1, min(int(wanted), num_items // _POINTS_PER_LIST))


def _half(dim: int) -> int:
    return max(dim // 2, 1)


INDEX_KINDS: Registry[IndexKind] = Registry("a kind of index")
"""The kinds of ``index.kind`` beside auto."""
INDEX_KINDS.add("flat", IndexKind(lambda n, d: "Flat", lambda d: 4 * d))
# 64 neighbours in the lowest layer, and few above it.
INDEX_KINDS.add("hnsw", IndexKind(lambda n, d: "HNSW32,Flat", lambda d: 4 * d + 272))
INDEX_KINDS.add("ivf_flat", IndexKind(lambda n, d: f"IVF{num_lists(n)},Flat", lambda d: 4 * d + 8, True))
INDEX_KINDS.add("ivf_sq8", IndexKind(lambda n, d: f"IVF{num_lists(n)},SQ8", lambda d: d + 8, True))
INDEX_KINDS.add(
    "ivf_pq", IndexKind(lambda n, d: f"IVF{num_lists(n)},PQ{_half(d)}", lambda d: d // 2 + 8, True)
)
INDEX_KINDS.add(
    "ivf_fastscan",
    IndexKind(lambda n, d: f"IVF{num_lists(n)},PQ{_half(d)}x4fs,Refine(SQ8)", lambda d: d // 4 + d + 8, True),
)
# Built on a GPU; ``twotower.index.spec`` knows the name.
INDEX_KINDS.add("cagra", IndexKind(lambda n, d: "CAGRA", lambda d: 4 * d + 272))
