"""The best that a model of generated data can be expected to do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twotower.config import GeneratedSource
from twotower.data.generated import true_scores
from twotower.data.knowledge import Holdout
from twotower.data.vocabulary import Vocabulary
from twotower.evaluation.ranking import rank_scores

Ints = NDArray[np.int64]

_SCORES_AT_ONCE = 1 << 24
"""True scores held at once: 64 MiB of float32."""


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
