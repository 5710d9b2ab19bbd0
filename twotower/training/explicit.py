"""Explicit negatives: what the user of an example was shown, or disliked, and did not choose.

Negative interactions of the fitted split as compressed rows by user, oldest first, 16 bytes each.

Shapes: B examples, U users, n negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.data.histories import ALWAYS, first_not_before
from twotower.data.interactions import Interactions, offsets
from twotower.schema import KINDS

_NEVER = np.iinfo(np.int32).max
_LEAST_WIDTH = 8


@dataclass(frozen=True)
class ExplicitNegatives:
    """Each user's negatives among the catalogue, without items that are among his positives."""

    offsets: npt.NDArray[np.int64]
    """[U + 1] int64; user u owns positions offsets[u] to offsets[u + 1]."""
    item_rows: npt.NDArray[np.int32]
    """[n] int32."""
    times: npt.NDArray[np.int64] | None
    """[n] int64, microseconds UTC, ascending inside a user; None where there are no times."""
    repeated_after: npt.NDArray[np.int32]
    """[n] int32, positions to the user's next negative of the same item; the largest int32 for the last."""

    @classmethod
    def of(cls, fitted: Interactions, num_catalogue_items: int, has_times: bool) -> ExplicitNegatives:
        """Return the negatives of the fitted split.

        An item that the user has as a positive anywhere in the split, before or after, is left out.

        Args:
            fitted: every kind of interaction of the fitted split and of no other.
            num_catalogue_items: items of other rows are left out.
            has_times: whether times mean anything.
        """
        positive = fitted.kind == KINDS["positive"]
        chosen = np.unique(_pairs(fitted, positive))
        kept = (fitted.kind == KINDS["negative"]) & (fitted.item_row < num_catalogue_items)
        pairs = _pairs(fitted, kept)
        liked = np.isin(pairs, chosen)
        kept[kept] = ~liked
        pairs = pairs[~liked]
        # Stable: equal pairs stay in the order of their positions.
        order = np.argsort(pairs, kind="stable")
        again = np.flatnonzero(pairs[order[1:]] == pairs[order[:-1]])
        repeated_after = np.full(len(pairs), _NEVER, np.int32)
        repeated_after[order[again]] = order[again + 1] - order[again]
        return cls(
            offsets(fitted.user_row[kept], fitted.num_users),
            fitted.item_row[kept],
            fitted.time[kept] if has_times else None,
            repeated_after,
        )

    def __len__(self) -> int:
        """Return n, the number of negatives."""
        return len(self.item_rows)

    def latest(
        self, users: npt.NDArray[np.int64], times: npt.NDArray[np.int64] | None, count: int
    ) -> npt.NDArray[np.int64]:
        """Return the latest different items that each user has as negatives at or before a time.

        Args:
            users: [B] int64 user rows.
            times: [B] int64 microseconds UTC; None takes all of each user's negatives, as do data
                without times, whatever is given here.
            count: the most items returned for each.

        Returns:
            item rows [B, count] int64, the latest first, -1 behind the last. Of equal times the later row
            comes first; in a list of impressions that is the order of the list.
        """
        begin, end = self.offsets[users], self.offsets[users + 1]
        if times is not None and self.times is not None:
            end = first_not_before(self.times, begin, end, np.minimum(times, ALWAYS - 1) + 1)
        found = np.full((len(users), count), -1, np.int64)
        num_found = np.zeros(len(users), np.int64)
        behind = end.copy()  # positions from here on have been looked at
        width = max(count, _LEAST_WIDTH)
        unfinished = np.flatnonzero(begin < end)
        while len(unfinished):
            at = behind[unfinished, None] - 1 - np.arange(width)
            inside = at >= begin[unfinished, None]
            at = np.where(inside, at, 0)
            # An item's last negative up to the time is the one with no other behind it.
            last = inside & (at + self.repeated_after[at].astype(np.int64) >= end[unfinished, None])
            place = num_found[unfinished, None] + np.cumsum(last, axis=1) - 1
            row, column = np.nonzero(last & (place < count))
            found[unfinished[row], place[row, column]] = self.item_rows[at[row, column]]
            num_found[unfinished] += last.sum(axis=1)
            behind[unfinished] -= width
            unfinished = unfinished[(num_found < count)[unfinished] & (behind > begin)[unfinished]]
            width *= 2  # only users with many repeats are left
        return found


def _pairs(interactions: Interactions, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The user and the item of each chosen interaction as one number."""
    return (interactions.user_row[chosen].astype(np.int64) << 32) | interactions.item_row[chosen]
