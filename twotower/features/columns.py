"""Columns to vocabularies and to rows of embedding tables: what several types of features have in common.

Shapes: n rows of a column, L ids of a row, V values of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower import cells
from twotower.errors import DataError
from twotower.features.base import UNKNOWN_ROW, ColumnFeature, Side
from twotower.values import as_categories, as_text, is_list, is_text, plain

T = TypeVar("T")


def checked(side: Side, spec: ColumnFeature, convert: Callable[[], T]) -> T:
    """Return what a conversion returns; its error also names the feature and its column.

    Raises:
        DataError: the conversion raised one.
    """
    try:
        return convert()
    except DataError as error:
        raise DataError(f"features.{side} {spec.name!r}, column {spec.source_column!r}: {error}") from None


def as_lists(array: pa.Array, separator: str) -> pa.Array:
    """Return the values of a multi_hot feature as lists of text: text is split, blank pieces are dropped.

    Raises:
        DataError: the array holds neither text nor lists of text or numbers.
    """
    array = plain(array)
    kind = array.type
    if pa.types.is_null(kind):
        return array.cast(pa.list_(pa.string()))
    if is_text(kind):
        pieces = cells.split_lists(array, separator)
    elif is_list(kind):
        pieces = array
    else:
        raise DataError(f"a multi_hot feature holds separated text or lists, not {kind}")
    flat, parents = cells.flattened(pieces)
    values = as_categories(pc.utf8_trim_whitespace(as_text(flat)))
    keep = np.asarray(pc.greater(pc.utf8_length(values), 0).fill_null(False))
    counts = np.bincount(parents[keep], minlength=len(array))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), values.filter(pa.array(keep)))
    missing = np.asarray(array.is_null())
    return pc.if_else(pa.array(missing), pa.scalar(None, lists.type), lists)


def most_frequent(texts: pa.StringArray, limit: int) -> list[str]:
    """Return the most frequent values that are not blank, by count and then by name."""
    counts = texts.drop_null().value_counts()
    pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    ranked = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return [value for value, _ in ranked[:limit] if value.strip()]


def value_rows(column: pa.Array, values: list[str]) -> npt.NDArray[np.int32]:
    """Return [n] int32: value i of the vocabulary is i + 1, another value is unknown, missing is -1."""
    found = pc.index_in(column, value_set=pa.array(values, pa.string()))
    ids: npt.NDArray[np.int32] = np.asarray(pc.fill_null(found, UNKNOWN_ROW - 1)).astype(np.int32) + 1
    ids[pc.is_null(column).to_numpy(zero_copy_only=False)] = -1
    return ids


def padded(rows: Iterable[list[int]], count: int, max_width: int) -> npt.NDArray[np.int32]:
    """Return rows of at most ``max_width`` ids as [count, L] int32, padded with -1 to the longest."""
    out = np.full((count, max_width), -1, np.int32)
    width = 1
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
        width = max(width, len(row))
    return np.ascontiguousarray(out[:, :width])


def values_of_some(
    feature: Any, column: pa.ChunkedArray, some: npt.NDArray[np.bool_], blank: str
) -> frozenset[str]:
    """Return the values of a feature's vocabulary that some rows have and no other.

    Args:
        feature: fitted, with a vocabulary.
        column: its column, of n rows.
        some: [n] bool, which rows.
        blank: a value that stands for none.
    """
    array = pa.concat_arrays(column.chunks)
    theirs, others = (feature.spec.labels(array.filter(pa.array(rows))) for rows in (some, ~some))
    if is_list(theirs.type):
        theirs, others = pc.list_flatten(theirs), pc.list_flatten(others)
    found = set(theirs.to_pylist()) - set(others.unique().to_pylist())
    return frozenset(found & set(feature.values or []) - {None, blank})
