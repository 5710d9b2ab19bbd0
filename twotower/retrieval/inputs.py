"""From queries to what the query tower and the search need: rows, columns, histories, exclusions.

Features are made by the same code as in training (``QueryFeatures`` and ``Histories``); this module decides
which of the stored and the given values go in.

Shapes: B queries, H longest history that a feature looks at, U users, N catalogue items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.data.histories import ALWAYS, NEVER, Histories
from twotower.data.vocabulary import Vocabulary
from twotower.errors import NotAllowedError, shown
from twotower.model.features import Columns
from twotower.retrieval.given import column_of, encode_given, stacked, static_features
from twotower.retrieval.query import HistoryItem, HistoryUse, Query, Strategy
from twotower.schema import MAX_WEIGHT, FeatureSchema

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class UserTable:
    """What is known of every user; the arrays may be memory-mapped."""

    ids: Vocabulary
    """The users, in row order."""
    histories: Histories
    """Positive interactions, at least the latest H of each user, and whose earlier ones are not there."""
    seen_offsets: npt.NDArray[np.int64]
    """[U + 1] int64: user u has had ``seen_item_rows[seen_offsets[u]:seen_offsets[u + 1]]``."""
    seen_item_rows: npt.NDArray[np.integer[Any]]
    """Item rows, of every kind of interaction, ascending for each user."""
    columns: Columns
    """Static columns by feature name, [U, ...]."""


@dataclass(frozen=True)
class Input:
    """One query in rows."""

    strategy: Strategy
    user_row: int
    """-1 is an unknown user."""
    history_rows: IntArray
    """[H] int64, the latest first, -1 behind the last. ``schema.num_items`` + j is number j of the items that
    the generation describes, and behind those come the ones of ``described``."""
    history_weights: FloatArray
    """[H] float32."""
    history_times: IntArray
    """[H] int64, microseconds UTC, ``NEVER`` where it is not known or no feature reads it."""
    columns: Columns
    """Static columns by feature name, [1, ...]."""
    excluded: IntArray
    """[e] int64 item rows that must not be answered, ascending."""
    use: HistoryUse
    """What the items of the history were read by."""
    described: tuple[Columns, ...] = ()
    """Static columns [1, ...] of items of the history that the query alone describes."""


class Inputs:
    """Resolves queries against the user table and the item vocabulary of one generation."""

    def __init__(
        self,
        schema: FeatureSchema,
        users: UserTable,
        item_ids: Vocabulary,
        described: IntArray | None = None,
        describes: bool = True,
    ) -> None:
        """Keep the tables.

        Args:
            schema: of the model.
            users: the user table.
            item_ids: the items that the towers were trained with, then those that updates added.
            described: [d] int64 ascending, rows of the latter whose features are known.
            describes: whether histories can read items by their features.
        """
        self.schema = schema
        self.users = users
        self.item_ids = item_ids
        self._described = np.zeros(0, np.int64) if described is None else described
        self._of_items = static_features(schema.item) if describes else []
        self._static = static_features(schema.query)
        self._missing = encode_given(self._static, {}, "features")

    @property
    def user_columns(self) -> list[str]:
        """Names of the user columns that a query may give values for."""
        return sorted({column_of(f) for f in self._static})

    @property
    def item_columns(self) -> list[str]:
        """Names of the item columns that a query may describe unknown items of its history by."""
        return sorted({column_of(f) for f in self._of_items})

    def check(self, query: Query) -> None:
        """Check what ``resolve`` would.

        Raises:
            NotAllowedError: as of ``resolve``.
        """
        self._given_columns(query.features)
        if query.history:
            self._given_history(query.history, self._listed_rows(query), ALWAYS)
        if query.at is not None:
            self._stored([query], self._user_rows([query]), [query.at])

    def resolve(self, query: Query, now: int) -> Input:
        """Return one query in rows.

        Args:
            query: the query.
            now: microseconds UTC, for a query that names no moment.

        Raises:
            NotAllowedError: a feature of the query is not known or not readable, or what its user had done
                before ``at`` is not all kept.
        """
        return self.resolve_all([query], now)[0]

    def resolve_all(self, queries: Sequence[Query], now: int) -> list[Input]:
        """Return each query in rows, as ``resolve`` does, looking up users and stored histories at once."""
        user_rows = self._user_rows(queries)
        moments = [now if query.at is None else query.at for query in queries]
        stored = self._stored(queries, user_rows, moments)
        return [
            self._resolved(query, row, moments[i], stored[0][i], stored[1][i], stored[2][i])
            for i, (query, row) in enumerate(zip(queries, user_rows.tolist(), strict=True))
        ]

    def _user_rows(self, queries: Sequence[Query]) -> IntArray:
        if len(queries) == 1 and queries[0].user_id is not None:
            # A third of what several take.
            row = self.users.ids.row(queries[0].user_id)
            return np.array([-1 if row is None else row], np.int64)
        rows = np.full(len(queries), -1, np.int64)
        named = [i for i, query in enumerate(queries) if query.user_id is not None]
        if named:
            ids = [query.user_id for query in queries if query.user_id is not None]
            rows[named] = self.users.ids.rows(ids, missing="negative")
        return rows

    def _stored(
        self, queries: Sequence[Query], user_rows: IntArray, moments: Sequence[int]
    ) -> tuple[IntArray, FloatArray, IntArray]:
        """Return the latest items [B, H], weights and times, that users had before a moment.

        What comes with a query replaces them, so that only queries without a history need them.
        """
        wanted = np.array([query.history is None for query in queries], np.bool_) & (user_rows >= 0)
        shape = len(queries), self.schema.max_history
        times = np.full(shape, NEVER, np.int64)
        if not wanted.any():
            return np.full(shape, -1, np.int64), np.zeros(shape, np.float32), times
        histories = self.users.histories
        found = histories.before(user_rows, np.array(moments, np.int64), self.schema.max_history)
        # Without ``at`` what lies in the future by this machine's clock is no reason to refuse.
        for i in np.flatnonzero(wanted & ~histories.reaches(user_rows, found[0])).tolist():
            if queries[i].at is not None:
                raise _not_kept(queries[i])
        if self.schema.time_gaps:
            times = histories.times_before(user_rows, np.array(moments, np.int64), shape[1])
        return *found, times

    def num_seen(self, user_id: str | None) -> int:
        """Return how many items a user has had; 0 for an unknown user."""
        row = None if user_id is None else self.users.ids.row(user_id)
        return 0 if row is None else int(self.users.seen_offsets[row + 1] - self.users.seen_offsets[row])

    def _resolved(
        self,
        query: Query,
        row: int,
        at: int,
        stored_rows: IntArray,
        stored_weights: FloatArray,
        stored_times: IntArray,
    ) -> Input:
        given = self._given_columns(query.features)
        listed = self._listed_rows(query)
        described: tuple[Columns, ...] = ()
        if query.history is None:
            rows, weights, times = stored_rows, stored_weights, stored_times
            use = HistoryUse(by_id=int((rows >= 0).sum()))
        else:
            rows, weights, times, use, described = self._given_history(query.history, listed, at)
        stored = self._missing if row < 0 else {n: c[row : row + 1] for n, c in self.users.columns.items()}
        strategy: Strategy
        if row >= 0:
            strategy = "personal"
        elif (rows >= 0).any():
            strategy = "history"
        elif any(value is not None for value in query.features.values()):
            strategy = "features"
        else:
            strategy = "popular"
        columns, excluded = {**stored, **given}, self._excluded(query, row, listed)
        return Input(strategy, row, rows, weights, times, columns, excluded, use, described)

    def batch(self, inputs: Sequence[Input]) -> tuple[IntArray, Columns, IntArray, FloatArray, IntArray]:
        """Return the arguments of ``QueryFeatures``: user rows [B], columns [B, ...], histories [B, H].

        The items that queries describe are numbered as ``described_columns`` has them.
        """
        columns = {f.spec.name: stacked([i.columns[f.spec.name] for i in inputs]) for f in self._static}
        rows = np.stack([i.history_rows for i in inputs])
        own = self.schema.num_items + len(self._described)
        before = 0
        for number, each in enumerate(inputs):
            if before and each.described:
                rows[number][rows[number] >= own] += before
            before += len(each.described)
        return (
            np.array([i.user_row for i in inputs], dtype=np.int64),
            columns,
            rows,
            np.stack([i.history_weights for i in inputs]),
            np.stack([i.history_times for i in inputs]),
        )

    def described_columns(self, inputs: Sequence[Input]) -> Columns | None:
        """Return the static columns of the m items that queries describe, [m, ...] each; None without any."""
        given = [columns for each in inputs for columns in each.described]
        if not given:
            return None
        return {f.spec.name: stacked([c[f.spec.name] for c in given]) for f in self._of_items}

    def _listed_rows(self, query: Query) -> IntArray:
        """Return the rows of the items of the query's history, -1 outside the vocabulary."""
        if not query.history:
            return np.zeros(0, np.int64)
        return self.item_ids.rows([h.item_id for h in query.history], missing="negative")

    def _given_history(
        self, history: Sequence[HistoryItem], listed: IntArray, at: int
    ) -> tuple[IntArray, FloatArray, IntArray, HistoryUse, tuple[Columns, ...]]:
        """Return the latest items of a history that count at a moment: rows, weights and times [H].

        Behind them, what they were read by, and the columns of those that the query describes.

        Raises:
            NotAllowedError: a weight is too large, or an item's features are not known or not readable.
        """
        num_items, length = self.schema.num_items, self.schema.max_history
        places = self._places(listed)
        rows, weights, times, described = list[int](), list[float](), list[int](), list[Columns]()
        use = {"by_id": 0, "by_features": 0, "ignored": 0}
        for i in range(len(history) - 1, -1, -1):
            item = history[i]
            if item.time is not None and item.time >= at:
                continue
            if len(rows) == length:
                break
            row = int(places[i])
            if row < 0 and self._of_items and any(v is not None for v in item.features.values()):
                row = num_items + len(self._described) + len(described)
                described.append(self._described_item(item.features, f"history[{i}].features"))
            use["ignored" if row < 0 else "by_id" if row < num_items else "by_features"] += 1
            if row >= 0:
                rows.append(row)
                weights.append(item.weight)
                times.append(NEVER if item.time is None else item.time)
        missing = length - len(rows)
        # NaN is above nothing, and not below either.
        if not all(abs(weight) <= MAX_WEIGHT for weight in weights):
            raise NotAllowedError("history: a weight is too large", f"-{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        return (
            np.array(rows + [-1] * missing, np.int64),
            np.array(weights + [0.0] * missing, np.float32),
            np.array(times + [NEVER] * missing, np.int64),
            HistoryUse(**use),
            tuple(described),
        )

    def _places(self, listed: IntArray) -> IntArray:
        """Return rows as histories have them, [m]: of what updates added, the number among the described."""
        later = listed >= self.schema.num_items
        if not later.any():
            return listed
        at = np.searchsorted(self._described, listed)
        there = np.append(self._described, -1)[at] == listed
        return np.where(later, np.where(there & bool(self._of_items), self.schema.num_items + at, -1), listed)

    def _described_item(self, values: Mapping[str, Any], where: str) -> Columns:
        known = self.item_columns
        for name in values:
            if name not in known:
                raise NotAllowedError(
                    f"{where}: the model reads no item column {name!r}",
                    ", ".join(known) or "none: this model reads nothing of the items of a history but ids",
                )
        return encode_given(self._of_items, dict(values), where)

    def _excluded(self, query: Query, user_row: int, listed: IntArray) -> IntArray:
        seen = np.zeros(0, np.int64)
        if query.exclude_seen and user_row >= 0:
            begin, end = self.users.seen_offsets[user_row], self.users.seen_offsets[user_row + 1]
            seen = np.asarray(self.users.seen_item_rows[begin:end], dtype=np.int64)
        more = [listed] if query.exclude_seen and len(listed) else []
        if query.exclude_items:
            more.append(self.item_ids.rows(query.exclude_items, missing="negative"))
        if not more:
            return seen
        rows = np.unique(np.concatenate([seen, *more]))
        return rows[rows >= 0]

    def _given_columns(self, values: dict[str, Any]) -> Columns:
        if not values:
            return {}
        known = self.user_columns
        for name in values:
            if name not in known:
                raise NotAllowedError(
                    f"features: the model has no user column {name!r}",
                    ", ".join(known)
                    if known
                    else "none: this model has no features of users beside id and history",
                )
        return encode_given([f for f in self._static if column_of(f) in values], values, "features")


def _not_kept(query: Query) -> NotAllowedError:
    return NotAllowedError(
        f"at: what user {shown(query.user_id)} had done before that moment is not all known: only his latest "
        "items are kept",
        "a later moment, or those items as history; a generation that is built with a larger "
        "index.kept_history reaches further back",
    )
