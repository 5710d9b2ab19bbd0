"""Popular items: what is answered where nothing is known of the user that the model could use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from twotower.generations.generation import Generation
from twotower.index.allowed import Allowed
from twotower.index.hits import Hits

_BLOCK_ROWS = 1 << 22


class Popularity:
    """The items of a generation that can be answered, the most popular first, with their scores."""

    def __init__(self, generation: Generation, answerable: npt.NDArray[np.int64]) -> None:
        """Rank them.

        Args:
            generation: of the items and of who has had them.
            answerable: its ``answerable_rows``.
        """
        self._ranking = popularity_ranking(generation, answerable)
        self._scores = popularity_scores(
            self._ranking, generation.seen_item_rows, len(generation.user_ids), len(generation.item_ids)
        )

    def best(self, excluded: npt.NDArray[np.int64], k: int, allowed: Allowed | None) -> Hits:
        """Return the most popular items that are allowed and not excluded.

        Args:
            excluded: [e] int64 item rows.
            k: how many are wanted.
            allowed: item rows that alone may be answered; all when not given.

        Returns:
            At most k of them, best first.
        """
        # Of the first k + e at most e are excluded; a filter may look further down the ranking.
        start, size = 0, k + len(excluded)
        kept = np.zeros(0, np.int64)
        while start < len(self._ranking) and len(kept) < k:
            block = self._ranking[start : start + size]
            inside = ~np.isin(block, excluded)
            if allowed is not None:
                inside &= allowed.contains(block)
            kept = np.concatenate([kept, start + np.flatnonzero(inside)])
            start, size = start + size, size * 4
        kept = kept[:k]
        return Hits(self._ranking[kept], self._scores[kept])


def popularity_ranking(generation: Generation, answerable: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the item rows that can be answered, the most popular first, those of updates last.

    Args:
        generation: of the ranking.
        answerable: its ``answerable_rows``: ascending [n] int64.

    Returns:
        [n] int64.
    """
    built = np.array(generation.popularity, dtype=np.int64)
    ranked = np.zeros(len(generation.item_ids), np.bool_)
    ranked[built] = True
    alive = np.zeros(len(ranked), np.bool_)
    alive[answerable] = True
    return np.concatenate([built[alive[built]], np.flatnonzero(alive & ~ranked)])


def popularity_scores(
    ranking: npt.NDArray[np.int64], seen_item_rows: npt.NDArray[np.int32], num_users: int, num_items: int
) -> npt.NDArray[np.float32]:
    """Return the score of each place of the popularity ranking: the share of users who have had the item.

    The ranking counts positive interactions, having had an item counts of every kind. Where the two
    disagree, a score is lowered to that of the place before, so that scores fall along the ranking.

    Args:
        ranking: [n] int64 item rows, the most popular first.
        seen_item_rows: [m] int32, each user's seen items one after the other; may be memory-mapped.
        num_users: number of users.
        num_items: items of the vocabulary.

    Returns:
        [n] float32 in [0, 1], falling.
    """
    counts = np.zeros(num_items, np.int64)
    for start in range(0, len(seen_item_rows), _BLOCK_ROWS):
        counts += np.bincount(seen_item_rows[start : start + _BLOCK_ROWS], minlength=num_items)
    shares = counts[ranking] / max(num_users, 1)
    return np.minimum.accumulate(shares).astype(np.float32)
