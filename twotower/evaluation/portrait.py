"""What a ranker's lists look like: how much is found down to each rank, and how popular what they show is.

Legend: Q queries, K columns of a ranked list, N catalogue items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
"""Cut-offs inside each power of ten at which recall is told."""
_BANDS = 8
"""Bands of popularity, at most, beside that of items without an interaction."""


class Found:
    """Recall at every rank; that of parts adds up to that of the whole.

    Args:
        length: of the lists, K.
    """

    def __init__(self, length: int) -> None:
        # The number of queries, and then the sum of their gains of recall at each rank.
        self._sums: Floats = np.zeros(1 + length)

    def add(self, hits: NDArray[np.bool_], num_relevant: Ints) -> None:
        """Add lists.

        Args:
            hits: [Q, K] bool, which of the ranked items are relevant.
            num_relevant: [Q] int64, relevant items of each query; those without any do not count.
        """
        counted = num_relevant > 0
        length = min(len(self._sums) - 1, hits.shape[1])
        self._sums[0] += counted.sum()
        self._sums[1 : length + 1] += (1.0 / num_relevant[counted]) @ hits[counted, :length]

    def state(self) -> Floats:
        """Return [1 + K] float64, what ``merge`` takes."""
        return self._sums

    def merge(self, state: Floats) -> None:
        """Add the state of other queries."""
        self._sums += state

    def recall(self, ks: Sequence[int]) -> list[float]:
        """Return the mean recall at each k; NaN where no query was counted."""
        upto = np.cumsum(self._sums[1:]) / (self._sums[0] or math.nan)
        return [float(upto[k - 1]) for k in ks]


def recall_ks(length: int) -> list[int]:
    """Return cut-offs from 1 to the length of a list, about evenly apart on a logarithmic axis."""
    ks = {int(step * 10**power) for power in range(len(str(length))) for step in _STEPS}
    return sorted({k for k in ks if k < length} | {length})


def recall_by_k(found: Mapping[str, Found], ks: Sequence[int]) -> dict[str, Any]:
    """Return recall by the length of the list: ``ks`` (those given among them), and ``rankers`` by name."""
    every = sorted({*recall_ks(max(ks)), *ks})
    return {"ks": every, "rankers": {name: each.recall(every) for name, each in found.items()}}


def exposure(counts: Ints, consumed: Ints, shown: Ints, k: int) -> dict[str, Any]:
    """Return how popular items are that are recommended, beside those that are consumed.

    Args:
        counts: [N] int64, interactions of each item before the test split.
        consumed: [N] int64, users who took it in the test split.
        shown: [N] int64, lists whose first k hold it.
        k: as it says.

    Returns:
        ``k`` and ``bands``, the least popular first: ``name`` such as "4-7" (interactions), ``label`` such as
        "4+", ``items`` in it, and the shares of all that was ``consumed`` and ``recommended``.
    """
    bands = []
    for low, high in band_edges(int(counts.max(initial=0))):
        inside = (counts >= low) & (counts <= high)
        if inside.any():
            bands.append(
                {
                    "name": f"{low:,}" if low == high else f"{low:,}\N{EN DASH}{high:,}",
                    "label": f"{low:,}" if high == 0 else f"{low:,}+",
                    "items": int(inside.sum()),
                    "consumed": float(consumed[inside].sum() / max(consumed.sum(), 1)),
                    "recommended": float(shown[inside].sum() / max(shown.sum(), 1)),
                }
            )
    return {"k": k, "bands": bands}


def band_edges(most: int) -> list[tuple[int, int]]:
    """Return bands of counts: 0, and then bands that widen by one factor, whole numbers, up to the most."""
    # The factor is the least power of the square root of two that needs no more bands than there may be.
    factor = max(2.0, math.sqrt(2) ** math.ceil(2 * math.log2(most + 1) / _BANDS)) if most else 2.0
    edges, low = [(0, 0)], 1
    while low <= most:
        high = max(low, math.ceil(low * factor) - 1)
        edges.append((low, min(high, most)))
        low = high + 1
    return edges
