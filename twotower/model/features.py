"""Rows of users, items and histories to the inputs of the towers: one code path for training and serving.

Static columns of the item and user tables are encoded once (``encode_columns``) and gathered by row.
A query's batch is made of its user's row and columns and of a history that ends before the query's time;
training takes both from the dataset, serving from a generation or the request.

Shapes: B rows of a batch, L ids of a bag, H history length, N catalogue items, V width of a profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from twotower.data.fitting import check_profiles
from twotower.data.windows import Stretches
from twotower.errors import DataError
from twotower.model.batch import Bag, FeatureBatch, Sequences, forget
from twotower.model.hashing import hashed_rows
from twotower.model.sequences import make_sequences
from twotower.model.unknown_items import DescribedItems, hashed_item_rows
from twotower.schema import (
    UNKNOWN_ROW,
    FeatureSchema,
    FittedFeature,
    HistoryFeature,
    IdFeature,
    ProfileFeature,
)
from twotower.values import plain

Columns = dict[str, npt.NDArray[Any]]


def encode_columns(features: Sequence[FittedFeature], table: pa.Table) -> Columns:
    """Return the static columns of an item or user table.

    Args:
        features: of one side; those that are not read from a column are passed over.
        table: one row an item or user; a column that is missing counts as missing in every row.

    Returns:
        by feature name: int32 ids [n, L] padded with -1 (categorical, multi_hot, text), or float32 [n, D]
        (vector; numeric with D = 2, the standardised value and a flag of 1 where it is missing).

    Raises:
        DataError: a column can not be read as its feature's type.
    """
    columns: Columns = {}
    for feature in features:
        spec = feature.spec
        if spec.source_column is None:
            continue
        present = spec.source_column in table.column_names
        column = table[spec.source_column] if present else pa.nulls(len(table))
        column = plain(column)
        try:
            columns[spec.name] = spec.encode(feature, column)
        except (DataError, pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError, TypeError) as error:
            raise DataError(
                f"column {spec.source_column!r} ({column.type}) can not be read as the {spec.type} feature "
                f"{spec.name!r}: {error}"
            ) from None
    return columns


def item_batch(schema: FeatureSchema, item_rows: npt.ArrayLike, columns: Columns) -> FeatureBatch:
    """Return the item tower's input.

    Args:
        schema: of the model.
        item_rows: [B] int64; -1 is an item outside the vocabulary.
        columns: static columns of these items, [B, ...] each.
    """
    rows = np.asarray(item_rows, dtype=np.int64)
    return {f.spec.name: _static_input(f, rows, columns) for f in schema.item}


def _static_input(
    feature: FittedFeature, rows: npt.NDArray[np.int64], columns: Columns
) -> Bag | torch.Tensor:
    if isinstance(feature.spec, IdFeature):
        return _id_bag(feature.spec, rows)
    values = columns[feature.spec.name]
    if values.dtype == np.float32:
        return torch.from_numpy(np.ascontiguousarray(values))
    ids = torch.from_numpy(values.astype(np.int64))
    valid = ids >= 0
    return Bag(ids, valid / valid.sum(1, keepdim=True).clamp(min=1))


def _id_bag(spec: IdFeature, rows_B: npt.NDArray[np.int64]) -> Bag:
    if spec.buckets is None:
        # Row -1, the unknown id, reads the first row of the table.
        ids = torch.from_numpy(rows_B[:, None] + (UNKNOWN_ROW + 1))
        return Bag(ids, torch.ones(ids.shape))
    rows = torch.tensor(rows_B)
    ids = hashed_rows(rows, spec.buckets, spec.hashes)
    return forget(Bag(ids, torch.ones(ids.shape)), rows < 0)


def profile_values(schema: FeatureSchema, item_columns: Columns) -> dict[str, npt.NDArray[np.float32]]:
    """Return what profiles average, by profile feature name: float32 [num_items, V], 0 outside the catalogue.

    Raises:
        DataError: a profile is too wide.
    """
    check_profiles(schema.query, schema.item)
    return averaged(schema, item_columns, schema.num_items)


def averaged(schema: FeatureSchema, item_columns: Columns, count: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return what profiles average of items, by profile feature name: float32 [count, V].

    Args:
        schema: of the model.
        item_columns: static columns of the first items; of the others it is 0.
        count: of items.
    """
    items = {f.spec.name: f for f in schema.item}
    values: dict[str, npt.NDArray[np.float32]] = {}
    for spec in schema.profiles:
        target = items[spec.of]
        column = item_columns[spec.of]
        width = target.profile_width
        out = np.zeros((count, width), np.float32)
        if column.dtype == np.float32:
            out[: len(column)] = column[:, :width]
        else:
            row, place = np.nonzero(column >= 0)
            out[row, column[row, place]] = 1.0
        values[spec.name] = out
    return values


class QueryFeatures:
    """Makes the query tower's input, in training and in serving."""

    def __init__(self, schema: FeatureSchema, profiles: dict[str, npt.NDArray[np.float32]]) -> None:
        """Keep the schema and what profiles average.

        Args:
            schema: of the model.
            profiles: from ``profile_values``; may be memory-mapped.
        """
        self.schema = schema
        self._profiles = profiles
        self._item_id = schema.item_id

    def __call__(
        self,
        user_rows: npt.ArrayLike,
        user_columns: Columns,
        history_rows: npt.ArrayLike,
        history_weights: npt.ArrayLike,
        history_times: npt.ArrayLike | None = None,
        stretches: Stretches | None = None,
        described: DescribedItems | None = None,
    ) -> FeatureBatch:
        """Return the input of a batch of queries.

        Args:
            user_rows: [B] int64; -1 is an unknown user.
            user_columns: static columns of these users, [B, ...] each.
            history_rows: [B, H] int64 item rows, the latest first, -1 behind the last; ``num_items`` + j is
                number j of ``described``.
            history_weights: [B, H] float32 interaction weights.
            history_times: [B, H] int64, microseconds UTC; what ``schema.time_gaps`` needs, if ``stretches``
                do not have it.
            stretches: what features read that encode sequences; each query's own history when not given.
            described: items of histories that have no row of their own.
        """
        users = np.asarray(user_rows, dtype=np.int64)
        items = np.asarray(history_rows, dtype=np.int64)
        weights = np.asarray(history_weights, dtype=np.float32)
        batch: FeatureBatch = {}
        for feature in self.schema.query:
            spec = feature.spec
            if isinstance(spec, HistoryFeature):
                length = spec.max_length
                times = None if history_times is None else np.asarray(history_times, np.int64)[:, :length]
                batch[spec.name] = self._history(
                    spec, items[:, :length], weights[:, :length], times, stretches, described
                )
            elif isinstance(spec, ProfileFeature):
                batch[spec.name] = self._profile(
                    spec, items[:, : spec.max_length], weights[:, : spec.max_length], described
                )
            else:
                batch[spec.name] = _static_input(feature, users, user_columns)
        return batch

    def _history(
        self,
        spec: HistoryFeature,
        items: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        times: npt.NDArray[np.int64] | None,
        stretches: Stretches | None,
        described: DescribedItems | None,
    ) -> Bag | Sequences:
        table, num_items = self._item_id if spec.share else None, self.schema.num_items
        extra = None
        if described is not None:
            extra = described.vectors.get(spec.table_name("query"))
            if extra is None:
                items = np.where(items < num_items, items, -1)
        if spec.encoded:
            read = Stretches.of_histories(items, times) if stretches is None else stretches
            gaps = spec.pooling == "transformer" and spec.transformer.time_gaps
            return make_sequences(read, spec.max_length, table, gaps, num_items, extra)
        valid = items >= 0
        pooled = torch.from_numpy(_pooling(spec, valid, weights))
        if table is None or table.buckets is None:
            # -1 stays where there is no item. Described items come behind the others, here as among items.
            return Bag(torch.from_numpy(items + (UNKNOWN_ROW + 1) * valid), pooled, extra)
        ids = hashed_item_rows(torch.tensor(items), table, None if extra is None else num_items)
        shares = torch.where(ids >= 0, pooled[..., None], 0.0)
        return Bag(ids.flatten(1), shares.flatten(1), extra)

    def _profile(
        self,
        spec: ProfileFeature,
        items: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        described: DescribedItems | None,
    ) -> torch.Tensor:
        """sum(w x) / max(count, 1) over the history, w clipped to [0, 1]."""
        values = self._profiles[spec.name]
        valid = items >= 0
        clipped = np.where(valid, np.minimum(np.maximum(weights, 0), 1), np.float32(0))
        if items.shape[1] == 0:
            return torch.zeros(len(items), values.shape[1])
        new = items >= self.schema.num_items if described is not None else None
        x = values[np.where(valid if new is None else valid & ~new, items, 0)]
        if described is not None and new is not None:
            x[new] = described.profiles[spec.name][items[new] - self.schema.num_items]
        total = np.einsum("bh,bhv->bv", clipped, x)
        return torch.from_numpy(total / np.maximum(valid.sum(1, keepdims=True), 1).astype(np.float32))


def _pooling(
    spec: HistoryFeature, valid: npt.NDArray[np.bool_], weights: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return what each item of histories [B, H] counts in their mean, 0 where there is none."""
    if spec.pooling == "mean":
        w = valid.astype(np.float32)
    elif spec.pooling == "weighted":
        w = np.where(valid, np.maximum(weights, 0), 0).astype(np.float32)
    else:
        w = (valid * spec.decay ** np.arange(valid.shape[1])).astype(np.float32)
    total = w.sum(1, keepdims=True)
    return np.asarray(w / np.where(total > 0, total, np.float32(1)), np.float32)
