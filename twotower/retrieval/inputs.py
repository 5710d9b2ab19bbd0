"""From queries to what the query tower and the search need: rows, columns, histories, exclusions.

Features are made by the same code as in training (``QueryFeatures`` and ``Histories``); this module decides
which of the stored and the given values go in.

Shapes: B queries, H longest history that a feature looks at, U users, N catalogue items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.data.histories import NEVER, Histories
from twotower.data.vocabulary import Vocabulary
from twotower.errors import DataError, NotAllowedError, shown
from twotower.model.features import Columns, encode_columns
from twotower.retrieval.query import HistoryItem, Query, Strategy
from twotower.schema import (
    MAX_WEIGHT,
    CategoricalFeature,
    FeatureSchema,
    FittedFeature,
    HistoryFeature,
    IdFeature,
    MultiHotFeature,
    NumericFeature,
    ProfileFeature,
    VectorFeature,
)
from twotower.values import category_of

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
    """[H] int64, the latest first, -1 behind the last."""
    history_weights: FloatArray
    """[H] float32."""
    history_times: IntArray
    """[H] int64, microseconds UTC, ``NEVER`` where it is not known or no feature reads it."""
    columns: Columns
    """Static columns by feature name, [1, ...]."""
    excluded: IntArray
    """[e] int64 item rows that must not be answered, ascending."""


class Inputs:
    """Resolves queries against the user table and the item vocabulary of one generation."""

    def __init__(self, schema: FeatureSchema, users: UserTable, item_ids: Vocabulary) -> None:
        """Keep the tables.

        Args:
            schema: of the model.
            users: the user table.
            item_ids: the items that the towers were trained with, then those that updates added.
        """
        self.schema = schema
        self.users = users
        self.item_ids = item_ids
        self._static = [
            f for f in schema.query if not isinstance(f.spec, (IdFeature, HistoryFeature, ProfileFeature))
        ]
        self._missing = _encoded(self._static, {})

    @property
    def user_columns(self) -> list[str]:
        """Names of the user columns that a query may give values for."""
        return sorted({_column(f) for f in self._static})

    def check(self, query: Query) -> None:
        """Check what ``resolve`` would.

        Raises:
            NotAllowedError: as of ``resolve``.
        """
        self._given_columns(query.features)
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
        if query.history is None:
            rows, weights, times = stored_rows, stored_weights, stored_times
        else:
            rows, weights, times = self._given_history(query.history, listed, at)
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
        return Input(strategy, row, rows, weights, times, columns, excluded)

    def batch(self, inputs: Sequence[Input]) -> tuple[IntArray, Columns, IntArray, FloatArray, IntArray]:
        """Return the arguments of ``QueryFeatures``: user rows [B], columns [B, ...], histories [B, H]."""
        columns = {f.spec.name: _stacked([i.columns[f.spec.name] for i in inputs]) for f in self._static}
        return (
            np.array([i.user_row for i in inputs], dtype=np.int64),
            columns,
            np.stack([i.history_rows for i in inputs]),
            np.stack([i.history_weights for i in inputs]),
            np.stack([i.history_times for i in inputs]),
        )

    def _listed_rows(self, query: Query) -> IntArray:
        """Return the rows of the items of the query's history, -1 outside the vocabulary."""
        if not query.history:
            return np.zeros(0, np.int64)
        return self.item_ids.rows([h.item_id for h in query.history], missing="negative")

    def _given_history(
        self, history: Sequence[HistoryItem], listed: IntArray, at: int
    ) -> tuple[IntArray, FloatArray, IntArray]:
        """Return the latest items of a history that count at a moment: rows, weights and times [H].

        Raises:
            NotAllowedError: a weight is too large.
        """
        length = self.schema.max_history
        counted = [
            (row, item.weight, NEVER if item.time is None else item.time)
            for row, item in zip(listed.tolist(), history, strict=True)
            # The query tower has no embedding of what an update added.
            if 0 <= row < self.schema.num_items and (item.time is None or item.time < at)
        ]
        latest = counted[::-1][:length]
        missing = length - len(latest)
        rows = [row for row, _, _ in latest] + [-1] * missing
        weights = [weight for _, weight, _ in latest] + [0.0] * missing
        times = [time for _, _, time in latest] + [NEVER] * missing
        # NaN is above nothing, and not below either.
        if not all(abs(weight) <= MAX_WEIGHT for weight in weights):
            raise NotAllowedError("history: a weight is too large", f"-{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        return np.array(rows, np.int64), np.array(weights, np.float32), np.array(times, np.int64)

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
        return _encoded([f for f in self._static if _column(f) in values], values)


def _not_kept(query: Query) -> NotAllowedError:
    return NotAllowedError(
        f"at: what user {shown(query.user_id)} had done before that moment is not all known: only his latest "
        "items are kept",
        "a later moment, or those items as history; a generation that is built with a larger "
        "index.kept_history reaches further back",
    )


def _column(feature: FittedFeature) -> str:
    spec = feature.spec
    assert not isinstance(spec, (IdFeature, HistoryFeature, ProfileFeature))
    return spec.source_column


def _encoded(features: Sequence[FittedFeature], values: dict[str, Any]) -> Columns:
    """Return the static columns [1, ...] of one user; a column without a value is missing."""
    columns: Columns = {}
    for feature in features:
        name = _column(feature)
        value = _checked(feature, values.get(name))
        try:
            # The name of the spare column can not be that of a feature: it makes the table one row long.
            table = pa.table({name: pa.array([value]), "": pa.nulls(1)})
            columns.update(encode_columns([feature], table))
        except DataError as error:
            raise NotAllowedError(f"features: {error}", _allowed(feature)) from None
    return columns


def _checked(feature: FittedFeature, value: Any) -> Any:
    """Return a value in a form that Arrow reads as the feature's type.

    Raises:
        NotAllowedError: it is of another type.
    """
    spec = feature.spec
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(spec, NumericFeature):
        if number:
            return float(value)
    elif isinstance(spec, VectorFeature):
        if isinstance(value, list) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in value
        ):
            return [float(v) for v in value]
    elif isinstance(spec, MultiHotFeature) and isinstance(value, list):
        names = [category_of(v) if isinstance(v, (str, int, float)) else None for v in value]
        # A fraction is a value where the column has such, and a slip elsewhere.
        known = (n for n, v in zip(names, value, strict=True) if isinstance(v, float) and not v.is_integer())
        if None not in names and all(name in (feature.values or []) for name in known):
            return names
    elif isinstance(value, str):
        return value
    elif isinstance(spec, (CategoricalFeature, MultiHotFeature)) and isinstance(value, (int, float)):
        return category_of(value)
    raise NotAllowedError(f"features: {_column(feature)!r} has the value {shown(value)}", _allowed(feature))


def _allowed(feature: FittedFeature) -> str:
    spec = feature.spec
    if isinstance(spec, NumericFeature):
        return "a number" + (" above -1" if spec.transform == "log1p" else "") + ", or null"
    if isinstance(spec, VectorFeature):
        return f"a list of {spec.dim} numbers, or null"
    if isinstance(spec, MultiHotFeature):
        return f"a list of texts, or one text separated by {spec.separator!r}, or null"
    return "a text or a number, or null" if isinstance(spec, CategoricalFeature) else "a text, or null"


def _stacked(columns: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return columns [1, L] below each other, ids padded with -1 to the longest."""
    width = max(c.shape[1] for c in columns)
    out = np.full((len(columns), width), -1, columns[0].dtype)
    for i, column in enumerate(columns):
        out[i, : column.shape[1]] = column[0]
    return out
