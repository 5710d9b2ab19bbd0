"""What each user did before a moment: the one place where training and serving look up histories.

Positive interactions as compressed rows by user: the items of user u, oldest first, are
``item_rows[offsets[u]:offsets[u + 1]]``. Training makes it from the dataset, serving opens the same
arrays from a generation.

Shapes: B queries, H history length, U users, n interactions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from twotower.errors import DataError
from twotower.schema import KINDS

if TYPE_CHECKING:
    from twotower.data.interactions import Interactions

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

Order = Literal["times", "rows", "none"]
"""What decides which of a user's interactions an example knows: those of an earlier time, those in earlier
rows (``split.ties: order``), or, where there are no times, all but those of its own item."""

ALWAYS = np.iinfo(np.int64).max
"""A time later than every interaction."""
NEVER = np.iinfo(np.int64).min
"""The time of an item of which none is known."""


@dataclass(frozen=True)
class Histories:
    """Positive interactions of each user, oldest first."""

    offsets: npt.NDArray[np.int64]
    """[U + 1] int64."""
    item_rows: npt.NDArray[np.int32]
    """[n] int32."""
    times: npt.NDArray[np.int64]
    """[n] int64, microseconds UTC; ascending inside a user."""
    weights: npt.NDArray[np.float32]
    """[n] float32."""
    cut: npt.NDArray[np.bool_] | None = None
    """[U] bool, whose earlier interactions are not among these; None is nobody's."""

    @property
    def num_users(self) -> int:
        """Number of users, with or without interactions."""
        return len(self.offsets) - 1

    @classmethod
    def of(cls, interactions: Interactions, capped: int | None = None) -> Histories:
        """Return the histories of interactions, of which only positive ones count.

        Args:
            interactions: sorted by user, time and file order.
            capped: keep only so many of the latest of each user.
        """
        keep = interactions.kind == KINDS["positive"]
        num_users = len(interactions.user_offsets) - 1
        users = interactions.user_row[keep]
        counts = np.bincount(users, minlength=num_users)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        items, times, weights = (
            c[keep] for c in (interactions.item_row, interactions.time, interactions.weight)
        )
        cut = None
        if capped is not None:
            from_end = offsets[users + 1] - np.arange(len(users))
            latest = from_end <= capped
            items, times, weights = items[latest], times[latest], weights[latest]
            cut = counts > capped
            offsets = np.concatenate([[0], np.cumsum(np.minimum(counts, capped))]).astype(np.int64)
        return cls(offsets, items, times, weights, cut)

    def before(
        self, user_rows: npt.ArrayLike, times: npt.ArrayLike | None, length: int
    ) -> tuple[IntArray, FloatArray]:
        """Return the latest items of each user strictly before a time.

        Args:
            user_rows: [B] int; -1 is an unknown user, who has no history.
            times: [B] int64 microseconds UTC; None takes all of each user's interactions.
            length: H, the most items returned for each user.

        Returns:
            item rows [B, H] int64, the latest first, -1 behind the last; weights [B, H] float32, 0 behind it.
        """
        users = np.asarray(user_rows, dtype=np.int64)
        begin, end = self._bounds(users)
        if times is not None:
            end = first_not_before(self.times, begin, end, np.asarray(times, dtype=np.int64))
        return self._take(begin, end, length)

    def times_before(self, user_rows: npt.ArrayLike, times: npt.ArrayLike | None, length: int) -> IntArray:
        """Return when the items were that ``before`` returns, [B, H] int64, ``NEVER`` behind the last."""
        users = np.asarray(user_rows, dtype=np.int64)
        begin, end = self._bounds(users)
        if times is not None:
            end = first_not_before(self.times, begin, end, np.asarray(times, dtype=np.int64))
        positions = end[:, None] - 1 - np.arange(length)
        there = positions >= begin[:, None]
        if not there.any():
            return np.full(positions.shape, NEVER)
        return np.where(there, self.times[np.where(there, positions, 0)], NEVER)

    def reaches(self, user_rows: npt.ArrayLike, found: IntArray) -> npt.NDArray[np.bool_]:
        """Return of each user whether what ``before`` found is all that it had to find, [B] bool.

        Args:
            user_rows: [B] int; -1 is an unknown user.
            found: [B, H] item rows as ``before`` gave them; fewer than H of a user whose earlier interactions
                are not kept may be too few.
        """
        users = np.asarray(user_rows, dtype=np.int64)
        if self.cut is None or found.shape[1] == 0:
            return np.ones(len(users), np.bool_)
        return (users < 0) | (found[:, -1] >= 0) | ~self.cut[np.maximum(users, 0)]

    def of_examples(
        self, user_rows: npt.ArrayLike, positions: npt.ArrayLike, length: int, order: Order
    ) -> tuple[IntArray, FloatArray]:
        """Return what the query of a training example knows: not the example itself, nor what comes later.

        Args:
            user_rows: [B] int, known users.
            positions: [B] int, the example's position inside the user's own interactions.
            length: H, the most items returned for each example.
            order: what decides which interactions are earlier.

        Returns:
            as ``before``; of equal times, and without times, the later row of the source comes first.

        Raises:
            DataError: a position is not one of the user's interactions.
        """
        begin, end = self._bounds(np.asarray(user_rows, dtype=np.int64))
        own = begin + np.asarray(positions, dtype=np.int64)
        if ((own < begin) | (own >= end)).any():
            raise DataError(
                "a position is outside the interactions of its user; use positions from these histories"
            )
        if order == "rows":
            return self._take(begin, own, length)
        if order == "times":
            when = self.times[own] if len(own) else np.empty(0, np.int64)
            return self._take(begin, first_not_before(self.times, begin, end, when), length)
        # Which came first is not known, so the item itself must not be among them, in whichever row.
        return self._take(begin, end, length, self.item_rows[own].astype(np.int64))

    def of_user(self, user_row: int) -> tuple[npt.NDArray[np.int32], IntArray, FloatArray]:
        """Return all of one user's (item_rows [m], times [m], weights [m]), oldest first."""
        part = slice(int(self.offsets[user_row]), int(self.offsets[user_row + 1]))
        return self.item_rows[part], self.times[part], self.weights[part]

    def _bounds(self, users: IntArray) -> tuple[IntArray, IntArray]:
        known = users >= 0
        row = np.where(known, users, 0)
        begin = np.asarray(self.offsets[row])
        end = np.where(known, self.offsets[row + 1], begin)
        return begin, end

    def _take(
        self,
        begin: IntArray,
        end: IntArray,
        length: int,
        left_out: IntArray | None = None,
    ) -> tuple[IntArray, FloatArray]:
        """Return the last ``length`` of positions [begin, end), the last first.

        Args:
            begin: [B] int64.
            end: [B] int64.
            length: H.
            left_out: [B] int64, an item that is passed over.
        """
        shape = len(begin), length
        if len(self.item_rows) == 0:
            return np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
        positions = end[:, None] - 1 - np.arange(length)
        if left_out is not None:
            positions = self._without(begin, end, length, left_out)
        valid = positions >= begin[:, None]
        safe = np.where(valid, positions, 0)
        rows = np.where(valid, self.item_rows[safe], -1).astype(np.int64)
        weights = np.where(valid, self.weights[safe], 0).astype(np.float32)
        return rows, weights

    def _without(self, begin: IntArray, end: IntArray, length: int, left_out: IntArray) -> IntArray:
        """Return the last ``length`` positions of [begin, end) that do not hold an item, -1 for none."""
        found = np.full((len(begin), length), -1, np.int64)
        num_found = np.zeros(len(begin), np.int64)
        behind = end.copy()  # positions from here on have been looked at
        unfinished = np.flatnonzero(begin < end)
        # An item is nearly always there once, so that one more than the length is enough.
        width = length + 1
        while len(unfinished):
            at = behind[unfinished, None] - 1 - np.arange(width)
            inside = at >= begin[unfinished, None]
            kept = inside & (self.item_rows[np.where(inside, at, 0)] != left_out[unfinished, None])
            place = num_found[unfinished, None] + np.cumsum(kept, axis=1) - 1
            row, column = np.nonzero(kept & (place < length))
            found[unfinished[row], place[row, column]] = at[row, column]
            num_found[unfinished] += kept.sum(axis=1)
            behind[unfinished] -= width
            unfinished = unfinished[(num_found < length)[unfinished] & (behind > begin)[unfinished]]
        return found


def without_users(
    offsets: npt.NDArray[np.int64], user_rows: npt.ArrayLike
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return compressed rows by user as they are when some users have none.

    Args:
        offsets: [U + 1] int64, where each user's entries begin.
        user_rows: users whose entries go.

    Returns:
        the new offsets [U + 1], and which entries stay [n] bool.
    """
    counts = np.diff(offsets)
    gone = np.zeros(len(counts), np.bool_)
    gone[np.asarray(user_rows, np.int64)] = True
    stays = ~np.repeat(gone, counts)
    left = np.where(gone, 0, counts)
    return np.concatenate([[0], np.cumsum(left)]).astype(np.int64), stays


def first_not_before(times: IntArray, begin: IntArray, end: IntArray, when: IntArray) -> IntArray:
    """Return for each segment of ascending times the first position with time >= when, its end if none is.

    Args:
        times: [n] int64.
        begin: [B] int64, first position of each segment.
        end: [B] int64, the position behind each segment.
        when: [B] int64.
    """
    last = end - 1
    late = (last >= begin) & (times[np.maximum(last, 0)] >= when) if len(times) else np.zeros(len(end), bool)
    if not late.any():
        # What serving asks nearly always: now is later than all that is known.
        return end
    low, high = np.where(late, begin, end), end.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        earlier = np.zeros(len(low), bool)
        earlier[open_] = times[middle[open_]] < when[open_]
        low = np.where(open_ & earlier, middle + 1, low)
        high = np.where(open_ & ~earlier, middle, high)
    return low
