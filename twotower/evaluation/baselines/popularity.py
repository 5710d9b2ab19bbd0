"""Items by how often they were taken, and by how often of late."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twotower.data.dataset import Dataset
from twotower.data.knowledge import Holdout
from twotower.data.sampling import popularity
from twotower.evaluation.ranking import rank_order
from twotower.schema import KINDS, SPLITS

Ints = NDArray[np.int64]

RECENT_SHARE = 0.1
"""Share of the time of train and validation, at its end, that counts as recent."""


def popularity_counts(dataset: Dataset) -> Ints:
    """Return the positives in train and validation of each catalogue item, [N] int64."""
    interactions = dataset.interactions
    before = interactions.select(interactions.split != SPLITS["test"])
    return popularity(before, dataset.num_items)[: dataset.num_catalogue_items]


def popular_order(dataset: Dataset) -> Ints:
    """Return catalogue items [N] int64 by positives in train and validation, the most first, then by row."""
    counts = popularity_counts(dataset)
    return np.lexsort((np.arange(len(counts)), -counts)).astype(np.int64)


def recent_order(dataset: Dataset) -> Ints | None:
    """Return catalogue items [N] int64 by positives in the last tenth of the time of train and validation.

    Equal ones follow by all their positives, then by row. None where interactions have no times.
    """
    interactions = dataset.interactions
    before = (interactions.split != SPLITS["test"]) & (interactions.kind == KINDS["positive"])
    if not dataset.has_times or not before.any():
        return None
    times = interactions.time[before]
    first, last = int(times.min()), int(times.max())
    recent = interactions.select(before & (interactions.time >= last - (last - first) * RECENT_SHARE))
    num_items = dataset.num_catalogue_items
    late, all_counts = popularity(recent, dataset.num_items)[:num_items], popularity_counts(dataset)
    return np.lexsort((np.arange(num_items), -all_counts, -late)).astype(np.int64)


class PopularityRanker:
    """Ranks every user's items in the same order."""

    def __init__(self, order: Ints) -> None:
        """Take catalogue items [N] int64, the first one best."""
        self._order = order

    def __call__(self, start: int, part: Holdout, k: int) -> Ints:
        """Return [Q, k] int64."""
        return rank_order(self._order, part.masked_offsets, part.masked_rows, k)
