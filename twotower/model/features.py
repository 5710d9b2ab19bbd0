"""Rows of users, items and histories to the inputs of the towers: one code path for training and serving.

Static columns of the item and user tables are encoded once (``encode_columns``) and gathered by row.
A query's batch is made of its user's row and columns and of a history that ends before the query's time;
training takes both from the dataset, serving from a generation or the request.

Shapes: B rows of a batch, L ids of a bag, H history length, N catalogue items, V width of a profile.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from twotower.data.cells import flattened
from twotower.data.fitting import MAX_VECTOR_ELEMENT, as_lists, check_profiles, transformed
from twotower.data.windows import Stretches
from twotower.errors import DataError
from twotower.model.batch import Bag, FeatureBatch, Sequences, forget
from twotower.model.hashing import hashed_rows
from twotower.model.sequences import make_sequences
from twotower.model.towers import table_name
from twotower.model.unknown_items import DescribedItems, hashed_item_rows
from twotower.schema import (
    UNKNOWN_ROW,
    CategoricalFeature,
    FeatureSchema,
    FittedFeature,
    HistoryFeature,
    IdFeature,
    MultiHotFeature,
    NumericFeature,
    ProfileFeature,
    TextFeature,
    VectorFeature,
)
from twotower.values import as_categories, as_numbers, as_text, examples, plain

Columns = dict[str, npt.NDArray[Any]]
_WORD = re.compile(r"\w+")
_MAX_SCALED = 1e15
"""Numbers further away than this leave nothing of a tower's other inputs, or overflow its 32-bit floats."""


def encode_columns(features: Sequence[FittedFeature], table: pa.Table) -> Columns:
    """Return the static columns of an item or user table.

    Args:
        features: of one side; id, history and profile features have no static column and are passed over.
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
        if isinstance(spec, (IdFeature, HistoryFeature, ProfileFeature)):
            continue
        present = spec.source_column in table.column_names
        column = table[spec.source_column] if present else pa.nulls(len(table))
        column = plain(column)
        try:
            columns[spec.name] = _encode(feature, column)
        except (DataError, pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError, TypeError) as error:
            raise DataError(
                f"column {spec.source_column!r} ({column.type}) can not be read as the {spec.type} feature "
                f"{spec.name!r}: {error}"
            ) from None
    return columns


def _encode(feature: FittedFeature, column: pa.Array) -> npt.NDArray[Any]:
    spec = feature.spec
    if isinstance(spec, CategoricalFeature):
        return _value_ids(as_categories(column), feature.values or [])[:, None]
    if isinstance(spec, MultiHotFeature):
        return _multi_hot(spec, feature.values or [], column)
    if isinstance(spec, TextFeature):
        return _padded(
            (text_buckets(t, spec) for t in as_text(column).to_pylist()), len(column), spec.max_length
        )
    if isinstance(spec, NumericFeature):
        return _numeric(feature, column)
    if isinstance(spec, VectorFeature):
        return _vector(spec, column)
    raise AssertionError(f"feature type {spec.type} has no static column")


def _value_ids(column: pa.Array, values: list[str]) -> npt.NDArray[np.int32]:
    """Return [n] int32: value i of the vocabulary is i + 1, another value is unknown, missing is -1."""
    found = pc.index_in(column, value_set=pa.array(values, pa.string()))
    ids = pc.fill_null(found, UNKNOWN_ROW - 1).to_numpy(zero_copy_only=False).astype(np.int32) + 1
    ids[pc.is_null(column).to_numpy(zero_copy_only=False)] = -1
    return ids


def split_values(spec: MultiHotFeature, column: pa.Array) -> pa.ListArray:
    """Return a multi_hot column as lists of names of values; blank pieces are left out."""
    return as_lists(column, spec.separator)


def _multi_hot(spec: MultiHotFeature, values: list[str], column: pa.Array) -> npt.NDArray[np.int32]:
    flat, parents = flattened(split_values(spec, column))
    ids = _value_ids(flat, values)
    if len(ids):
        # Each value counts once a row, in ascending order: a set has no order of its own.
        _, first = np.unique(parents * (len(values) + 2) + ids, return_index=True)
        ids, parents = ids[first], parents[first]
    counts = np.bincount(parents, minlength=len(column))
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(min(max(counts.max(initial=1), 1), spec.max_length))
    out = np.full((len(column), width), -1, np.int32)
    kept = place < width
    out[parents[kept], place[kept]] = ids[kept]
    return out


def _numeric(feature: FittedFeature, column: pa.Array) -> npt.NDArray[np.float32]:
    values = numeric_values(feature.spec, column)
    missing = ~np.isfinite(values)
    with np.errstate(over="ignore"):
        scaled = np.where(missing, 0.0, (np.where(missing, 0.0, values) - feature.mean) / feature.std)
    if len(large := values[np.abs(scaled) > _MAX_SCALED]):
        raise ValueError(f"{large[0]} is over {_MAX_SCALED:g} standard deviations away; repair the column")
    return np.stack([scaled, missing], axis=1).astype(np.float32)


def numeric_values(spec: Any, column: pa.Array) -> npt.NDArray[np.float64]:
    """Return a numeric column after its transform as [n] float64, NaN where it is missing."""
    found = as_numbers(column)
    if found is None:
        raise ValueError("it holds no numbers")
    if found.unreadable.any():
        raise ValueError(f"{examples(column, np.flatnonzero(found.unreadable)[:1])[0]!r} is no finite number")
    return transformed(spec, found.values)


def _vector(spec: VectorFeature, column: pa.Array) -> npt.NDArray[np.float32]:
    out = np.zeros((len(column), spec.dim), np.float32)
    if pa.types.is_null(column.type):
        return out
    valid = pc.is_valid(column).to_numpy(zero_copy_only=False)
    flat, parents = flattened(column)
    widths = np.unique(np.bincount(parents, minlength=len(column))[valid])
    if len(widths) and (widths != spec.dim).any():
        raise ValueError(f"vectors have width {widths.tolist()}, declared is dim {spec.dim}")
    elements = flat.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    out[valid] = elements.reshape(-1, spec.dim)
    if not np.isfinite(out).all():
        raise ValueError("vectors hold NaN or infinity; repair the column")
    if len(large := out[np.abs(out) > MAX_VECTOR_ELEMENT]):
        raise ValueError(
            f"vectors hold {large[0]:g}; {MAX_VECTOR_ELEMENT:g} is the largest; repair the column"
        )
    return out


def text_buckets(text: str | None, spec: TextFeature) -> list[int]:
    """Return the hashed words and character n-grams of a text, at most ``max_length`` of them."""
    if not text:
        return []
    # No more of a long text is read than counts.
    found = itertools.islice(_WORD.finditer(text.lower()), spec.max_length)
    words = [match[0] for match in found]
    marked = (f"<{word}>" for word in words)
    grams = (m[i : i + spec.ngram] for m in marked for i in range(max(len(m) - spec.ngram + 1, 1)))
    pieces = itertools.islice(itertools.chain((f"w:{w}" for w in words), grams), spec.max_length)
    return [zlib.crc32(p.encode()) % spec.buckets for p in pieces]


def _padded(rows: Iterable[list[int]], count: int, max_width: int) -> npt.NDArray[np.int32]:
    out = np.full((count, max_width), -1, np.int32)
    width = 1
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
        width = max(width, len(row))
    return np.ascontiguousarray(out[:, :width])


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
    spec = feature.spec
    if isinstance(spec, IdFeature):
        return _id_bag(spec, rows)
    values = columns[spec.name]
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
    for feature in schema.query:
        spec = feature.spec
        if not isinstance(spec, ProfileFeature):
            continue
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
        self._item_id = next((f.spec for f in schema.item if isinstance(f.spec, IdFeature)), None)

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
                    feature, items[:, :length], weights[:, :length], times, stretches, described
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
        feature: FittedFeature,
        items: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        times: npt.NDArray[np.int64] | None,
        stretches: Stretches | None,
        described: DescribedItems | None,
    ) -> Bag | Sequences:
        spec = feature.spec
        assert isinstance(spec, HistoryFeature)
        table, num_items = self._item_id if spec.share else None, self.schema.num_items
        extra = None
        if described is not None:
            extra = described.vectors.get(table_name("query", feature))
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
