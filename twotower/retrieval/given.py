"""Values that come with a query, of its user or of an item of its history, to static columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.errors import DataError, NotAllowedError, shown
from twotower.model.features import Columns, encode_columns
from twotower.schema import FittedFeature


def static_features(features: Sequence[FittedFeature]) -> list[FittedFeature]:
    """Return the features that are read from a column of a table."""
    return [f for f in features if f.spec.source_column is not None]


def column_of(feature: FittedFeature) -> str:
    """Return the column that a static feature is read from."""
    column = feature.spec.source_column
    assert column is not None
    return column


def encode_given(features: Sequence[FittedFeature], values: dict[str, Any], where: str) -> Columns:
    """Return the static columns [1, ...] of one user or item; a column without a value is missing.

    Args:
        features: static ones.
        values: by column.
        where: they stand in the query, for errors.

    Raises:
        NotAllowedError: a value can not be read as its feature's type.
    """
    columns: Columns = {}
    for feature in features:
        name = column_of(feature)
        value = _checked(feature, values.get(name), where)
        try:
            # The name of the spare column can not be that of a feature: it makes the table one row long.
            table = pa.table({name: pa.array([value]), "": pa.nulls(1)})
            columns.update(encode_columns([feature], table))
        except DataError as error:
            raise NotAllowedError(f"{where}: {error}", feature.spec.allowed) from None
    return columns


def _checked(feature: FittedFeature, value: Any, where: str) -> Any:
    """Return a value in a form that Arrow reads as the feature's type.

    Raises:
        NotAllowedError: it is of another type.
    """
    if value is None:
        return None
    try:
        return feature.spec.parse(feature, value)
    except ValueError:
        raise NotAllowedError(
            f"{where}: {column_of(feature)!r} has the value {shown(value)}", feature.spec.allowed
        ) from None


def stacked(columns: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return columns [1, L] below each other, ids padded with -1 to the longest."""
    width = max(c.shape[1] for c in columns)
    out = np.full((len(columns), width), -1, columns[0].dtype)
    for i, column in enumerate(columns):
        out[i, : column.shape[1]] = column[0]
    return out
