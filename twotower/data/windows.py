"""Stretches of users' histories, each of which a sequence encoder reads once for many queries.

A causal encoder that reads a stretch oldest first has, at each of its items, seen what a query knows that
comes behind that item. So one pass serves all examples of a *window*: those of one user whose queries know
nearly the same. A user of up to L items is one window. Of a longer one the window number k begins at item
k S of the user's history, S being half of L rounded up, and an example is in the first window that reaches
as far as its query knows: such a query is encoded from its latest L - S + 1 to L items. Examples of equal
times read at the same item, the last one strictly before them.

Shapes: B queries, H history length, L the longest stretch, w stretches, m items of them all, n examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.data.histories import Histories, Order

IntArray = npt.NDArray[np.int64]
_USER_BITS = 32


@dataclass(frozen=True)
class Stretches:
    """What the queries of a batch know, several of them reading one stretch of items."""

    item_rows: IntArray
    """[m] int64, stretch by stretch, oldest first."""
    lengths: IntArray
    """[w] int64, items of each stretch, at least 1."""
    of_query: IntArray
    """[B] int64, the stretch that each query reads; -1 for a query that knows nothing."""
    known: IntArray
    """[B] int64, how many items of it the query knows, its oldest ones; 0 for one that knows nothing."""
    times: IntArray | None = None
    """[m] int64, microseconds UTC, ``histories.NEVER`` where it is not known; None where nobody asks."""
    names: IntArray | None = None
    """[w] int64, a number that a window has in every batch and on every rank; None where stretch i is that
    of the i-th query that knows something, and of no other."""

    @classmethod
    def of_histories(cls, history_rows: IntArray, history_times: IntArray | None = None) -> Stretches:
        """Return stretches of which each query reads one of its own, and all of it.

        Args:
            history_rows: [B, H] int64 item rows, the latest first, -1 behind the last.
            history_times: [B, H] int64, their times.
        """
        there = history_rows >= 0
        known = there.sum(axis=1)
        some = known > 0
        of_query = np.where(some, np.cumsum(some) - 1, -1)
        # The latest comes first in a row: read backwards, rows are oldest first with -1 in front.
        oldest_first = there[:, ::-1]
        items = history_rows[:, ::-1][oldest_first]
        times = None if history_times is None else history_times[:, ::-1][oldest_first]
        return cls(items, known[some], of_query, known, times)


@dataclass(frozen=True)
class Windows:
    """The windows of all examples of some users."""

    histories: Histories
    begin: IntArray
    """[w] int64, position among the histories of the first item of each window."""
    place: IntArray
    """[w] int64, place of that item in its user's own history."""
    users: IntArray
    """[w] int64, user of each window, by number in the histories."""
    first: IntArray
    """[w + 1] int64; examples first[i] to first[i + 1] are those of window i."""
    known: npt.NDArray[np.int32]
    """[n] int32, how many items of its window the query of each example knows."""

    @classmethod
    def of(
        cls, histories: Histories, examples: IntArray, users: IntArray, length: int, order: Order
    ) -> Windows:
        """Cut the histories of users into windows.

        Args:
            histories: of the fitted split.
            examples: [n] int64 positions among the histories, ascending.
            users: [n] int64, the user of each example, by number in the histories.
            length: L, the longest stretch.
            order: what decides which items an example's query knows; not ``none``, in which no item comes
                before another.
        """
        assert order != "none"
        known = examples - histories.offsets[users]
        if order == "times":
            # Items of one time know none of each other: where their time begins is what they know.
            times = histories.times
            begins = np.zeros(len(times), np.bool_)
            begins[1:] = times[1:] != times[:-1]
            begins[histories.offsets[:-1][np.diff(histories.offsets) > 0]] = True
            moment = np.maximum.accumulate(np.where(begins, np.arange(len(times)), 0))
            known = moment[examples] - histories.offsets[users]
        stride = stride_of(length)
        place = np.where(known <= length, 0, -(-(known - length) // stride)) * stride
        new = np.ones(len(examples), np.bool_)
        new[1:] = (users[1:] != users[:-1]) | (place[1:] != place[:-1])
        first = np.flatnonzero(new)
        return cls(
            histories,
            histories.offsets[users[first]] + place[first],
            place[first],
            users[first],
            np.append(first, len(examples)),
            (known - place).astype(np.int32),
        )

    def __len__(self) -> int:
        """Return w."""
        return len(self.begin)

    def stretches(self, examples: IntArray, user_rows: IntArray) -> Stretches:
        """Return the windows that some examples read, each as far as one of these reads it.

        Args:
            examples: [B] int64 numbers of examples, -1 for padding, which knows nothing.
            user_rows: [B] int64, row in the user table of the user of each, which names windows.
        """
        padding = examples < 0
        safe = np.maximum(examples, 0)
        known = np.where(padding, 0, self.known[safe]).astype(np.int64)
        window = np.searchsorted(self.first, safe, side="right") - 1
        reads = np.flatnonzero(known > 0)
        distinct, seen, of_reader = np.unique(window[reads], return_index=True, return_inverse=True)
        # In the order in which the batch comes to them, so that neighbours in a batch read neighbours.
        order = np.argsort(seen, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        distinct, seen = distinct[order], seen[order]
        of_query = np.full(len(examples), -1, np.int64)
        of_query[reads] = rank[of_reader]
        lengths = np.zeros(len(distinct), np.int64)
        np.maximum.at(lengths, of_query[reads], known[reads])
        ends = np.cumsum(lengths)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            self.begin[distinct] - (ends - lengths), lengths
        )
        return Stretches(
            self.histories.item_rows[at].astype(np.int64),
            lengths,
            of_query,
            known,
            self.histories.times[at],
            (user_rows[reads[seen]] << _USER_BITS) + self.place[distinct],
        )

    def shuffled(self, random: np.random.Generator, among: IntArray) -> IntArray:
        """Return numbers of examples window after window, windows in random order, [m] int64.

        Args:
            random: generator; the order follows from it and from the windows that are read.
            among: [m] int64 numbers of examples, ascending.
        """
        window = np.searchsorted(self.first, among, side="right") - 1
        _, first, counts = np.unique(window, return_index=True, return_counts=True)
        order = random.permutation(len(first))
        lengths = counts[order]
        ends = np.cumsum(lengths)
        ordered: IntArray = among[np.arange(len(among)) + np.repeat(first[order] - (ends - lengths), lengths)]
        return ordered


def stride_of(length: int) -> int:
    """Return S, by how many items a window begins after the one before: half of L, rounded up."""
    return -(-length // 2)
