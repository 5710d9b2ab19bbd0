"""What a model has to beat, and what it can reach: popularity, and the true model of generated data."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twotower.config import GeneratedSource
from twotower.data.dataset import Dataset
from twotower.data.generated import true_scores
from twotower.data.knowledge import Holdout
from twotower.data.sampling import popularity
from twotower.data.vocabulary import Vocabulary
from twotower.evaluation.ranking import rank_order, rank_scores
from twotower.schema import SPLITS

Ints = NDArray[np.int64]

_SCORES_AT_ONCE = 1 << 24
"""True scores held at once: 64 MiB of float32."""


def popular_order(dataset: Dataset) -> Ints:
    """Return catalogue items [N] int64 by positives in train and validation, the most first, then by row."""
    interactions = dataset.interactions
    before = interactions.select(interactions.split != SPLITS["test"])
    counts = popularity(before, dataset.num_items)[: dataset.num_catalogue_items]
    return np.lexsort((np.arange(len(counts)), -counts)).astype(np.int64)


class PopularityRanker:
    """Ranks every user's items in the same order."""

    def __init__(self, order: Ints) -> None:
        """Take catalogue items [N] int64, the most popular first."""
        self._order = order

    def __call__(self, start: int, part: Holdout, k: int) -> Ints:
        """Return [Q, k] int64."""
        return rank_order(self._order, part.masked_offsets, part.masked_rows, k)


class TrueRanker:
    """Ranks by the probabilities that generated interactions were drawn from."""

    def __init__(self, source: GeneratedSource, user_ids: Vocabulary) -> None:
        """Take the generator's settings and the ids of the dataset's users."""
        self._source = source
        self._user_ids = user_ids

    def __call__(self, start: int, part: Holdout, k: int) -> Ints:
        """Return [Q, k] int64."""
        step = max(1, _SCORES_AT_ONCE // self._source.num_items)
        lists = [np.empty((0, k), dtype=np.int64)]
        for first in range(0, len(part), step):
            piece = part.part(first, min(first + step, len(part)))
            scores = true_scores(self._source, self._user_ids.ids(piece.user_rows))
            lists.append(rank_scores(scores, piece.masked_offsets, piece.masked_rows, k))
        return np.concatenate(lists)
