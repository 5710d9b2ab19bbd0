"""Vectors as trained towers make them: low-rank, in clusters of very different sizes, of unit length.

White noise would flatter no index and resembles no catalogue: its nearest neighbours are hardly nearer than
the rest. Here a vector is a cluster's centre plus spread, both of few dimensions whose variance falls, and
some noise in all dimensions. Queries come from the same law with more noise, as users do.

Symbols: N vectors, Q queries, D dimensions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

_RANK = 24
_CLUSTERS = 2_000
_ZIPF = 1.3
"""Exponent of the cluster sizes: the largest holds about a quarter of the vectors."""
_SPREAD = 0.6
_ITEM_NOISE = 0.25
_QUERY_NOISE = 0.4
_BLOCK = 250_000


def make(n: int, dim: int = 128, seed: int = 0, num_queries: int = 2_048) -> tuple[FloatArray, FloatArray]:
    """Return (vectors [N, D], queries [Q, D]), float32 of unit length.

    Args:
        n: N.
        dim: D.
        seed: of the law and of the draws; the same vectors come first whatever N is.
        num_queries: Q.
    """
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((_RANK, dim)) / np.sqrt(1 + np.arange(_RANK))[:, None]
    centres = rng.standard_normal((_CLUSTERS, _RANK)).astype(np.float32)
    law = basis.astype(np.float32), centres
    vectors = np.empty((n, dim), np.float32)
    for number, start in enumerate(range(0, n, _BLOCK)):
        block = vectors[start : start + _BLOCK]
        block[:] = _draw(law, _BLOCK, _ITEM_NOISE, np.random.default_rng([seed, 1, number]))[: len(block)]
    return vectors, _draw(law, num_queries, _QUERY_NOISE, np.random.default_rng([seed, 2]))


def _draw(
    law: tuple[FloatArray, FloatArray], count: int, noise: float, rng: np.random.Generator
) -> FloatArray:
    basis, centres = law
    cluster = rng.zipf(_ZIPF, size=count) % len(centres)
    inner = centres[cluster] + _SPREAD * rng.standard_normal((count, _RANK), dtype=np.float32)
    drawn = inner @ basis + noise * rng.standard_normal((count, basis.shape[1]), dtype=np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float32)
